"""Measuring: cases with their references, interleaved timing, peak memory, physical limits, result files."""
