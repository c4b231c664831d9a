"""Which form of the LTI scan runs, from the shapes alone: a roofline of matrix products and memory traffic."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from compressm.kernels.core.plan import KernelPlan


@dataclass(frozen=True)
class Rates:
    """What a device sustains: floating point operations and bytes per second, and seconds per extra table entry."""

    flops: float
    bytes: float
    table: float


CPU_RATES = Rates(flops=190e9, bytes=24e9, table=8e-9)
GPU_RATES = Rates(flops=200e12, bytes=3.0e12, table=1e-11)

MAX_TAU = 64
STORE_BYTES = 1 << 30  # keep all states for the backward up to this size, else recompute them tile by tile
TILE_BYTES = 3 << 19  # states of one tile; a core's L2 cache and a share of L3


def _product(rates: Rates, rows: float, inner: int, columns: int) -> float:
    """Seconds of one (rows, inner) x (inner, columns) product: the slower of arithmetic and traffic."""
    return max(2 * rows * inner * columns / rates.flops, 4 * rows * (inner + columns) / rates.bytes)


def _seconds(rates: Rates, rows: float, H: int, H_out: int, N: int, tau: int) -> float:
    """Modelled seconds of the forward with blocks of tau steps (tau = 1: the plain scan)."""
    blocks = rows / tau
    time = _product(rates, blocks, tau * H, 2 * N) + _product(rates, blocks, 2 * N, tau * H_out)
    time += 4 * blocks * 4 * N / rates.bytes
    if tau > 1:
        time += _product(rates, blocks, tau * H, tau * H_out)
        time += (tau * (H + H_out) * 2 * N + tau * tau * H * H_out) * rates.table
    return time


@functools.lru_cache(maxsize=4096)
def plan_lti_scan(backend: str, batch: int, length: int, H: int, H_out: int, N: int, gpu: bool) -> KernelPlan:
    """The plan for u (batch, length, H), N complex states, H_out outputs on a backend that was already chosen."""
    rates = GPU_RATES if gpu else CPU_RATES
    rows = max(1, batch * length)
    times = {1: _seconds(rates, rows, H, H_out, N, 1)}
    for tau in range(2, min(MAX_TAU, length) + 1):
        divides = length % tau == 0
        if divides or (tau & (tau - 1)) == 0:
            remainder = 0.0 if divides else _seconds(rates, batch * (length % tau), H, H_out, N, 1)
            times[tau] = _seconds(rates, rows, H, H_out, N, tau) + remainder
    tau = min(times, key=times.__getitem__)
    if times[tau] > 0.9 * times[1]:
        tau = 1
    config = [("tau", tau)] if tau > 1 else []
    if backend == "cpp":
        state_bytes = 8 * max(1, N)
        stored = 8 * N * rows // tau
        config += [("rows", max(32, min(1024, TILE_BYTES // state_bytes))), ("store", int(stored <= STORE_BYTES))]
    form = "block" if tau > 1 else "scan"
    reason = f"modelled {times[tau] * 1e3:.3g} ms forward" + (f", scan {times[1] * 1e3:.3g} ms" if tau > 1 else "")
    return KernelPlan("lti_scan", backend, form, tuple(sorted(config)), reason)
