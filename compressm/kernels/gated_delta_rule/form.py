"""In which chunks the gated delta rule is computed: a pure function of sizes."""

from __future__ import annotations

import math

LEAST, MOST, GRAIN = 32, 64, 16
TIMES = 6.0  # as measured on a CPU with AVX-512


def chunk_length(keys: int, values: int, length: int) -> int:
    """Steps of a chunk.

    Per step and head, the products within a chunk of T steps cost as T (K + V), and the states that the backward keeps as
    K V / T: the best T is as the square root of K V / (K + V).

    Args:
        keys: K; values: V; length: L.
    """
    best = GRAIN * round(TIMES * math.sqrt(keys * values / max(keys + values, 1)) / GRAIN)
    return max(1, min(max(best, LEAST), MOST, length))
