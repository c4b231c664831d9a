"""In which chunks Mamba-2's scan is computed: a pure function of sizes."""

from __future__ import annotations

import functools
import math

LEAST, MOST, GRAIN = 32, 128, 16
TIMES = 10.0  # as measured on CPUs with AVX2 and with AVX-512


@functools.lru_cache(maxsize=4096)
def chunk_length(states: int, channels: int, length: int) -> int:
    """Steps of a chunk.

    Per step and head, the products within a chunk of T steps cost as T (N + P), and the states that are read and written
    between chunks as N P / T: the best T is as the square root of N P / (N + P).

    Args:
        states: N; channels: P; length: L.
    """
    best = GRAIN * round(TIMES * math.sqrt(states * channels / max(states + channels, 1)) / GRAIN)
    return max(1, min(max(best, LEAST), MOST, length))
