"""The record of the decode step of linear attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compressm.kernels.core import matrix_step
from compressm.kernels.core.op import WORD, Cost, Measured, Op, Sample
from compressm.kernels.linear_attention_update.op import choose_backend, linear_attention_update


def draw(sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device, *, channelwise: bool = True) -> Sample:
    """The state in float32, as models keep it.

    Args:
        channelwise: each channel of the keys has its decay.
    """
    batch, shared, heads, keys, values = (sizes[name] for name in ("batch", "key_heads", "heads", "keys", "values"))
    decays = torch.randn((batch, heads, keys) if channelwise else (batch, heads), device=device)
    tensors = {
        "state": torch.randn(batch, heads, keys, values, device=device),
        **{name: torch.randn(batch, shared, keys, device=device).to(dtype) for name in ("q", "k")},
        "v": torch.randn(batch, heads, values, device=device).to(dtype),
        "g": torch.nn.functional.logsigmoid(decays).div_(16.0).to(dtype),
    }
    return Sample(tensors, {}, {"batch": dict.fromkeys((*tensors, "out"), 0)})


def cost(sizes: Mapping[str, int], word: int, backward: bool) -> Cost:
    """One token, the state read and written."""
    batch, shared, heads, keys, values = (sizes[name] for name in ("batch", "key_heads", "heads", "keys", "values"))
    cells, decays = batch * heads * keys * values, batch * heads * keys
    moved = WORD * 2 * cells + word * (2 * batch * heads * values + 2 * batch * shared * keys + decays)
    return Cost(moved, 5 * cells, decays)


def measured(gpu: bool) -> tuple[Measured, ...]:
    base = {"batch": 64 if gpu else 4, "key_heads": 4, "heads": 4, "values": 128}
    return (Measured(tuple({**base, "keys": n} for n in (64, 16))),)


OPS = (
    Op(
        name="linear_attention_update",
        title="Decode step (linear attention)",
        about="one decoded token of linear attention with a decay for every key channel",
        function=linear_attention_update,
        sizes={"batch": 4, "key_heads": 4, "heads": 4, "keys": 64, "values": 128},
        small=tuple(
            {"batch": b, "key_heads": h, "heads": v, "keys": s, "values": p}
            for b, h, v, s, p in ((3, 2, 4, 5, 7), (1, 1, 1, 1, 1), (2, 3, 3, 100, 70))
        ),
        draw=draw,
        cost=cost,
        plan=matrix_step.planner("linear_attention_update", choose_backend),
        shapes=matrix_step.SHAPES,
        writes=("state",),
        differentiable=False,
        measured=measured,
        gpu="compressm.kernels.linear_attention_update.gpu",
    ),
)
