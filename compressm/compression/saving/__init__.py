"""Checkpoints: one file, or a folder of shards."""

from compressm.compression.saving.checkpoint import load, save

__all__ = ["load", "save"]
