"""Control theory on frozen systems; it knows no nn.Module."""

from compressm.control.balancing import Balanced, Reduction, balance
from compressm.control.coordinates import blend, real_gramians, slots
from compressm.control.system import DiagonalSystem

__all__ = ["Balanced", "DiagonalSystem", "Reduction", "balance", "blend", "real_gramians", "slots"]
