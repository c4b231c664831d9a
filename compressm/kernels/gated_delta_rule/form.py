"""In which chunks the gated delta rule is computed: a pure function of sizes."""

from __future__ import annotations

LEAST, MOST, GRAIN = 32, 64, 16


def chunk_length(keys: int, values: int, length: int) -> int:
    """Steps of a chunk.

    Per step and head, the products within a chunk of T steps cost as T (K + V), and those with the state as 3 K V, but the
    latter are slow where T is small.

    Args:
        keys: K; values: V; length: L.
    """
    best = GRAIN * round(keys * values / max(keys + values, 1) / GRAIN)
    return max(1, min(max(best, LEAST), MOST, length))
