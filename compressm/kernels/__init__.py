"""What runs on every token, and the Gramians: one public function per op, chosen backends underneath.

``core/`` holds what ops share; an op is a folder with its function, its reference, its backends and its record (``OPS``, see
:class:`compressm.kernels.core.op.Op`).  ``fused_cpu/`` is for this project's layers.
"""

from compressm.kernels.causal_conv1d import causal_conv1d, causal_conv1d_update
from compressm.kernels.core.plan import KernelPlan
from compressm.kernels.diagonal_scan import diagonal_scan
from compressm.kernels.gated_delta_rule import gated_delta_rule
from compressm.kernels.gated_delta_rule_update import gated_delta_rule_update
from compressm.kernels.gramians import Gramians, gramians, gramians_many
from compressm.kernels.linear_attention import linear_attention, mlstm
from compressm.kernels.linear_attention_update import linear_attention_update
from compressm.kernels.lti_scan import lti_scan, lti_scan_planar
from compressm.kernels.planning import OPS, plan
from compressm.kernels.selective_scan import selective_scan
from compressm.kernels.selective_state_update import selective_state_update
from compressm.kernels.ssd import ssd

__all__ = [
    "OPS",
    "Gramians",
    "KernelPlan",
    "causal_conv1d",
    "causal_conv1d_update",
    "diagonal_scan",
    "gated_delta_rule",
    "gated_delta_rule_update",
    "gramians",
    "gramians_many",
    "linear_attention",
    "linear_attention_update",
    "lti_scan",
    "lti_scan_planar",
    "mlstm",
    "plan",
    "selective_scan",
    "selective_state_update",
    "ssd",
]
