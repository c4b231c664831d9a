"""The record of the diagonal scan."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compressm.kernels.core.op import WORD, Cost, Op, Sample
from compressm.kernels.core.plan import KernelPlan
from compressm.kernels.diagonal_scan.op import choose_backend, diagonal_scan


def draw(
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    reverse: bool = False,
    states: bool = True,
    slowest: float = 0.02,
    fastest: float = 0.2,
) -> Sample:
    """Moduli in [exp(-slowest - fastest), exp(-slowest)].

    Args:
        reverse: backwards in time.
        states: with an initial state.
    """
    batch, length, n = (sizes[name] for name in ("batch", "length", "states"))
    tensors = {
        "x": torch.randn(batch, length, 2 * n, device=device).to(dtype),
        "log_decay": -fastest * torch.rand(n, device=device) - slowest,
        "phase": 6 * torch.rand(n, device=device),
    }
    if states:
        tensors["initial_state"] = torch.randn(batch, 2 * n, device=device)
    along = {"batch": {"x": 0, "initial_state": 0, "out": 0}, "time": {"x": 1, "out": 1}}
    return Sample(tensors, {"reverse": reverse}, along)


def cost(sizes: Mapping[str, int], word: int, backward: bool) -> Cost:
    """All states written."""
    cells, states = sizes["batch"] * sizes["length"] * sizes["states"], sizes["states"]
    passes = 5 if backward else 2
    return Cost(2 * word * passes * cells + WORD * 2 * states, (24 if backward else 8) * cells, states)


def plan(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: str, backend: str | None) -> KernelPlan:
    return KernelPlan("diagonal_scan", choose_backend(device, dtype, backend=backend), "scan")


OPS = (
    Op(
        name="diagonal_scan",
        title="Diagonal scan",
        about="all states of a complex diagonal recurrence",
        function=diagonal_scan,
        sizes={"batch": 16, "length": 1024, "states": 384},
        small=tuple({"batch": b, "length": n, "states": s} for b, n, s in ((2, 33, 5), (1, 1, 13), (3, 257, 1), (1, 600, 40))),
        draw=draw,
        cost=cost,
        plan=plan,
        shapes={"x": "(batch, L, 2N)"},
        gpu="compressm.kernels.diagonal_scan.gpu",
    ),
)
