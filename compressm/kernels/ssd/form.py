"""In which chunks Mamba-2's scan is computed: a pure function of sizes."""

from __future__ import annotations

import functools

LEAST, MOST = 16, 64
TIMES = 5.6  # of sqrt(N)


@functools.lru_cache(maxsize=4096)
def chunk_length(states: int, channels: int, length: int) -> int:
    """Steps of a chunk.

    Per step, the products within a chunk of T steps cost T / 2 (P + N), and the states that are read and written between
    chunks N P / T: the best T grows with the square root of N.

    Args:
        states: N; channels: P; length: L.
    """
    best = round(TIMES * states**0.5 / LEAST) * LEAST
    return max(1, min(max(best, LEAST), MOST, length))
