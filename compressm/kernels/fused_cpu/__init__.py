"""Private: blocks of several operations that layers run as one on CPU."""

from compressm.kernels.fused_cpu.cross_entropy import cross_entropy
from compressm.kernels.fused_cpu.gates import gelu_dropout, glu_dropout_add, linear_glu_dropout_add
from compressm.kernels.fused_cpu.lru_scan import lru_scan
from compressm.kernels.fused_cpu.norms import layer_norm, layer_norm_mean, rms_norm
from compressm.kernels.fused_cpu.standardized_linear import standardized_linear

__all__ = [
    "cross_entropy",
    "gelu_dropout",
    "glu_dropout_add",
    "layer_norm",
    "layer_norm_mean",
    "linear_glu_dropout_add",
    "lru_scan",
    "rms_norm",
    "standardized_linear",
]
