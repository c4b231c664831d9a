"""The record of the decode step."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compressm.errors import bad_argument
from compressm.kernels.core.op import WORD, Cost, Measured, Op, Sample
from compressm.kernels.core.plan import KernelPlan
from compressm.kernels.selective_state_update.op import choose_backend, selective_state_update


def draw(sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device, *, groups: int | None = None) -> Sample:
    """Of Mamba-1, the state in float32, as models keep it; B and C have an axis of groups where there are ``groups``."""
    batch, channels, states = (sizes[name] for name in ("batch", "channels", "states"))
    shared = (batch, states) if groups is None else (batch, groups, states)
    tensors = {
        "state": torch.randn(batch, channels, states, device=device),
        **{name: torch.randn(batch, channels, device=device).to(dtype) for name in ("x", "dt", "z")},
        "A": -torch.arange(1.0, states + 1, device=device).repeat(channels, 1),
        **{name: torch.randn(shared, device=device).to(dtype) for name in ("B", "C")},
        "D": torch.randn(channels, device=device),
        "dt_bias": torch.randn(channels, device=device) - 4.0,
    }
    return Sample(tensors, {"dt_softplus": True}, {"batch": dict.fromkeys(("state", "x", "dt", "z", "B", "C", "out"), 0)})


def cost(sizes: Mapping[str, int], word: int, backward: bool) -> Cost:
    """One token, the state read and written."""
    batch, channels, states = (sizes[name] for name in ("batch", "channels", "states"))
    wide, cells = batch * channels, batch * channels * states
    moved = WORD * (2 * cells + channels * (states + 2)) + word * (4 * wide + 2 * batch * states)
    return Cost(moved, 6 * cells + 8 * wide, cells + 3 * wide)


def plan(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: str, backend: str | None) -> KernelPlan:
    if shapes["state"][1:] != shapes["A"]:
        raise bad_argument("shapes", got=dict(shapes), expected="state (batch, D, N) and A (D, N)")
    return KernelPlan("selective_state_update", choose_backend(device, dtype, False, backend=backend), "step")


def measured(gpu: bool) -> tuple[Measured, ...]:
    base = {"batch": 128, "channels": 2560} if gpu else {"batch": 16, "channels": 512}
    return (Measured(tuple({**base, "states": n} for n in (128, 12))),)


OPS = (
    Op(
        name="selective_state_update",
        title="Decode step (selective state update)",
        about="one decoded token of Mamba",
        function=selective_state_update,
        sizes={"batch": 16, "channels": 512, "states": 128},
        small=tuple({"batch": b, "channels": d, "states": s} for b, d, s in ((3, 96, 5), (1, 7, 1), (2, 33, 100))),
        draw=draw,
        cost=cost,
        plan=plan,
        shapes={"state": "(batch, D, N)", "A": "(D, N)"},
        writes=("state",),
        differentiable=False,
        measured=measured,
        gpu="compressm.kernels.selective_state_update.gpu",
    ),
)
