"""One step of a selective scan."""

from compressm.kernels.selective_state_update.op import selective_state_update
from compressm.kernels.selective_state_update.record import OPS

__all__ = ["OPS", "selective_state_update"]
