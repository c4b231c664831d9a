"""One token of linear attention."""

from compressm.kernels.linear_attention_update.op import linear_attention_update
from compressm.kernels.linear_attention_update.record import OPS

__all__ = ["OPS", "linear_attention_update"]
