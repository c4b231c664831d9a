"""Mamba's scan."""

from compressm.kernels.selective_scan.op import selective_scan
from compressm.kernels.selective_scan.record import OPS

__all__ = ["OPS", "selective_scan"]
