"""In which chunks the gated delta rule is computed, and where Triton does not: pure functions of sizes."""

from __future__ import annotations

import math

from compressm.errors import BackendError

LEAST, MOST, GRAIN = 32, 64, 16
TIMES = 6.0  # as measured on a CPU with AVX-512
HELD = 1024  # rows of a state that a program holds in Triton: those of twice as many exceed an H100's shared memory


def chunk_length(keys: int, values: int, length: int) -> int:
    """Steps of a chunk.

    Per step and head, the products within a chunk of T steps cost as T (K + V), and the states that the backward keeps as
    K V / T: the best T is as the square root of K V / (K + V).

    Args:
        keys: K; values: V; length: L.
    """
    best = GRAIN * round(TIMES * math.sqrt(keys * values / max(keys + values, 1)) / GRAIN)
    return max(1, min(max(best, LEAST), MOST, length))


def too_wide(keys: int) -> str | None:
    """Why the Triton kernels do not run K key channels; None if they do.  They run any V."""
    if keys <= HELD:
        return None
    return f"K = {keys} exceeds the {HELD} key channels a head that a Triton program holds; cut the layer for them"


def check_named(op: str, backend: str | None, keys: int) -> None:
    """Raise BackendError where Triton is asked for by name and K is too wide for it."""
    if backend == "triton" and (reason := too_wide(keys)):
        way_out = "or leave backend out: torch runs it in chunks"
        raise BackendError(f"{op}: backend 'triton' cannot run this call: {reason}, {way_out}")


def form_for(backend: str, keys: int) -> str:
    """What runs inside an op where a backend was chosen without a look at sizes."""
    return "chunked" if backend == "triton" and too_wide(keys) else backend
