"""The one room that mutates: parameters, optimizer state and averages change together, or not at all."""

from compressm.compression.surgery.moments import UnknownStateWarning
from compressm.compression.surgery.optimizer_state import attach_masters, register_optimizer_state
from compressm.compression.surgery.stale import StaleCopyWarning

__all__ = ["StaleCopyWarning", "UnknownStateWarning", "attach_masters", "register_optimizer_state"]
