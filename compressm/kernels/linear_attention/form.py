"""How linear attention with decays of key channels is computed: pure functions of sizes."""

from __future__ import annotations

from compressm.kernels.ssd.form import chunk_length

BLOCK = 32  # steps that a tile of a state walks over: their operands stay in the nearest caches


def steps_of(backend: str, keys: int, values: int, length: int) -> int:
    """Steps of a block of the walk in C++, or of a chunk of torch's products.

    Args:
        keys: K; values: V; length: L.
    """
    return max(1, min(BLOCK, length)) if backend == "cpp" else chunk_length(keys, values, length)
