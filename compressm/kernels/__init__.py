"""What runs on every token, and the Gramians: one public function per op, chosen backends underneath."""

from compressm.kernels._plan import KernelPlan
from compressm.kernels.causal_conv1d import causal_conv1d, causal_conv1d_update
from compressm.kernels.cross_entropy import cross_entropy
from compressm.kernels.diagonal_scan import diagonal_scan
from compressm.kernels.gates import gelu_dropout, glu_dropout_add, linear_glu_dropout_add
from compressm.kernels.gramians import Gramians, gramians, gramians_many
from compressm.kernels.lru_scan import lru_scan
from compressm.kernels.lti_scan import lti_scan, lti_scan_planar
from compressm.kernels.norms import layer_norm, layer_norm_mean, rms_norm
from compressm.kernels.planning import plan
from compressm.kernels.selective_scan import selective_scan
from compressm.kernels.selective_state_update import selective_state_update
from compressm.kernels.standardized_linear import standardized_linear

__all__ = [
    "Gramians",
    "KernelPlan",
    "causal_conv1d",
    "causal_conv1d_update",
    "cross_entropy",
    "diagonal_scan",
    "gelu_dropout",
    "glu_dropout_add",
    "gramians",
    "gramians_many",
    "layer_norm",
    "layer_norm_mean",
    "linear_glu_dropout_add",
    "lru_scan",
    "lti_scan",
    "lti_scan_planar",
    "plan",
    "rms_norm",
    "selective_scan",
    "selective_state_update",
    "standardized_linear",
]
