"""Linear attention, with or without decays."""

from compressm.kernels.linear_attention.mlstm import mlstm
from compressm.kernels.linear_attention.op import linear_attention
from compressm.kernels.linear_attention.record import OPS

__all__ = ["OPS", "linear_attention", "mlstm"]
