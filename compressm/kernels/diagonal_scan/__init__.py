"""All states of a diagonal recurrence."""

from compressm.kernels.diagonal_scan.op import diagonal_scan
from compressm.kernels.diagonal_scan.record import OPS

__all__ = ["OPS", "diagonal_scan"]
