"""Mamba-2's scan."""

from compressm.kernels.ssd.op import ssd
from compressm.kernels.ssd.record import OPS

__all__ = ["OPS", "ssd"]
