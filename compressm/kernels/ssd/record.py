"""The record of Mamba-2's scan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels.core.op import WORD, Cost, Function, Measured, Op, Sample, compiled
from compressm.kernels.core.plan import KernelPlan
from compressm.kernels.ssd import chunked
from compressm.kernels.ssd.form import chunk_length
from compressm.kernels.ssd.op import plan_for_shapes, ssd


def draw(
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    bounds: Sequence[int] | None = None,
    gate: bool = False,
    states: bool = False,
) -> Sample:
    """Step sizes of 1e-3 to 1e-1 and decays of 1 to 16, as a layer begins with; with skip and softplus.

    Args:
        bounds: cu_seqlens of packed sequences.
        gate: with z.
        states: with initial and final states.
    """
    batch, length, heads, channels = (sizes[name] for name in ("batch", "length", "heads", "channels"))
    groups, n = sizes["groups"], sizes["states"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    step = torch.exp(torch.empty(heads, device=device).uniform_(math.log(1e-3), math.log(1e-1)))
    tensors = {
        "x": normal(batch, length, heads, channels).to(dtype),
        "dt": normal(batch, length, heads).mul_(0.3).to(dtype),
        "A": -torch.empty(heads, device=device).uniform_(1.0, 16.0),
        "B": normal(batch, length, groups, n).to(dtype),
        "C": normal(batch, length, groups, n).to(dtype),
        "D": normal(heads),
        "dt_bias": step.expm1().log(),
    }
    options: dict[str, Any] = {"dt_softplus": True, "return_final_states": states}
    if gate:
        tensors["z"] = normal(batch, length, heads, channels).to(dtype)
    if bounds is not None:
        options["cu_seqlens"] = torch.tensor(bounds, device=device, dtype=torch.int32)
    if states:
        sequences = batch if bounds is None else len(bounds) - 1
        tensors["initial_states"] = normal(sequences, heads, channels, n)
    shared = ("x", "dt", "z", "out")
    along = {}
    if bounds is None:
        along["batch"] = dict.fromkeys((*shared, "B", "C"), 0) | dict.fromkeys(("initial_states", "final_states"), 0)
    if groups == 1:
        along["heads"] = dict.fromkeys(shared, 2) | dict.fromkeys(("A", "D", "dt_bias"), 0)
        along["heads"] |= dict.fromkeys(("initial_states", "final_states"), 1)
    return Sample(tensors, options, along)


def cost(sizes: Mapping[str, int], word: int, backward: bool) -> Cost:
    """With skip and softplus."""
    batch, length, heads, channels = (sizes[name] for name in ("batch", "length", "heads", "channels"))
    steps, wide = batch * length * heads, batch * length * heads * channels
    shared, parameters = batch * length * sizes["groups"] * sizes["states"], 3 * heads
    cells = wide * sizes["states"]
    flops, exponentials = 5 * cells + 3 * wide + 4 * steps, 2 * steps
    moved = word * (2 * wide + 2 * shared + steps) + WORD * parameters
    if backward:
        flops += 13 * cells + 6 * wide + 8 * steps
        exponentials *= 2
        moved += word * (3 * wide + 4 * shared + 2 * steps) + 2 * WORD * parameters
    return Cost(moved, flops, exponentials)


def plan(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: str, backend: str | None) -> KernelPlan:
    (batch, length, heads, _), (rows, steps, groups, states) = shapes["x"], shapes["B"]
    if (batch, length) != (rows, steps) or groups == 0 or heads % groups:
        raise bad_argument("shapes", got=dict(shapes), expected="x (batch, L, H, P) and B (batch, L, G, N), G dividing H")
    return plan_for_shapes(device, dtype, shapes["x"], groups, states, backend)


def in_chunks(sizes: Mapping[str, int], dtype: torch.dtype) -> Function:
    """With skip and softplus, in torch's own products."""
    chunk = chunk_length(sizes["states"], sizes["channels"], sizes["length"])

    def call(p: dict[str, Tensor]) -> Tensor:
        return chunked.ssd(
            p["x"], p["dt"], p["A"], p["B"], p["C"], p["D"], None, p["dt_bias"], None, None, None, True, 0.0, math.inf, True,
            chunk,
        )[0]

    return call


def measured(gpu: bool) -> tuple[Measured, ...]:
    large, small = {"batch": 8, "length": 2048, "heads": 24}, {"batch": 2, "length": 1024, "heads": 8}
    base = {**(large if gpu else small), "channels": 64, "groups": 1}
    return (Measured(tuple({**base, "states": n} for n in (128, 16))),)


OPS = (
    Op(
        name="ssd",
        title="Mamba-2's scan",
        about="Mamba-2's scan with skip and softplus",
        function=ssd,
        sizes={"batch": 2, "length": 1024, "heads": 8, "channels": 64, "groups": 1, "states": 128},
        small=tuple(
            {"batch": b, "length": n, "heads": h, "channels": p, "groups": g, "states": s}
            for b, n, h, p, g, s in ((2, 33, 4, 7, 2, 5), (1, 1, 3, 16, 3, 13), (3, 257, 2, 5, 1, 1), (1, 40, 2, 17, 1, 100))
        ),
        draw=draw,
        cost=cost,
        plan=plan,
        shapes={"x": "(batch, L, H, P)", "B": "(batch, L, G, N)"},
        returns=("out", "final_states"),
        rivals={"torch in chunks": in_chunks},
        compiled=compiled(in_chunks),
        measured=measured,
        gpu="compressm.kernels.ssd.gpu",
    ),
)
