"""Watching reductions, and undoing those that cost too much."""

from compressm.compression.guard.rollback import Rollback

__all__ = ["Rollback"]
