"""Gramians of diagonal systems."""

from compressm.kernels.gramians.op import Gramians, gramians, gramians_many
from compressm.kernels.gramians.record import OPS

__all__ = ["OPS", "Gramians", "gramians", "gramians_many"]
