"""Checkpoints: one file, or a folder of shards."""
