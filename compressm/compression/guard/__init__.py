"""Watching reductions, and undoing those that cost too much."""
