"""The record of the decode step of the gated delta rule."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compressm.kernels.core import matrix_step
from compressm.kernels.core.op import WORD, Cost, Measured, Op, Sample
from compressm.kernels.gated_delta_rule_update.op import choose_backend, gated_delta_rule_update


def draw(sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device, *, channelwise: bool = False) -> Sample:
    """The state in float32, as models keep it.

    Args:
        channelwise: each channel of the keys has its decay.
    """
    batch, shared, heads, keys, values = (sizes[name] for name in ("batch", "groups", "heads", "states", "channels"))
    decays = (batch, heads, keys) if channelwise else (batch, heads)
    tensors = {
        "state": torch.randn(batch, heads, keys, values, device=device),
        **{name: torch.randn(batch, shared, keys, device=device).to(dtype) for name in ("q", "k")},
        "v": torch.randn(batch, heads, values, device=device).to(dtype),
        "g": -torch.randn(decays, device=device).sub_(3.0).exp_().to(dtype),
        "beta": torch.rand(batch, heads, device=device).to(dtype),
    }
    return Sample(tensors, {"use_qk_l2norm_in_kernel": True}, {"batch": dict.fromkeys((*tensors, "out"), 0)})


def cost(sizes: Mapping[str, int], word: int, backward: bool) -> Cost:
    """One token, the state read and written."""
    batch, shared, heads, keys, values = (sizes[name] for name in ("batch", "groups", "heads", "states", "channels"))
    cells, wide = batch * heads * keys * values, batch * heads * values
    moved = WORD * 2 * cells + word * (2 * wide + 2 * batch * shared * keys + 2 * batch * heads)
    return Cost(moved, 7 * cells + 3 * wide, batch * heads)


def measured(gpu: bool) -> tuple[Measured, ...]:
    large = {"batch": 64, "groups": 16, "heads": 32}
    small = {"batch": 4, "groups": 4, "heads": 8}
    base = {**(large if gpu else small), "channels": 128}
    return (Measured(tuple({**base, "states": n} for n in (128, 32))),)


OPS = (
    Op(
        name="gated_delta_rule_update",
        title="Decode step (gated delta rule)",
        about="one decoded token of Gated DeltaNet",
        function=gated_delta_rule_update,
        sizes={"batch": 4, "groups": 4, "heads": 8, "states": 128, "channels": 128},
        small=tuple(
            {"batch": b, "groups": h, "heads": v, "states": s, "channels": p}
            for b, h, v, s, p in ((3, 2, 4, 5, 7), (1, 1, 1, 1, 1), (2, 3, 3, 100, 70))
        ),
        draw=draw,
        cost=cost,
        plan=matrix_step.planner("gated_delta_rule_update", choose_backend),
        shapes=matrix_step.SHAPES,
        writes=("state",),
        differentiable=False,
        measured=measured,
        gpu="compressm.kernels.gated_delta_rule_update.gpu",
    ),
)
