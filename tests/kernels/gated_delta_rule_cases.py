"""Inputs of the gated delta rule and one evaluation of outputs and gradients, shared by the tests of its backends."""

from __future__ import annotations

import torch
from kernels.evaluation import with_gradients

from compressm.kernels import gated_delta_rule

TENSORS = ["q", "k", "v", "g", "beta", "initial_state"]
GOLDEN = ["delta_B1_L130_HK1_H2_K13_V7_head", "delta_B2_L65_HK2_H4_K16_V8_head", "delta_B1_L70_HK2_H2_K32_V16_channel"]


def random_inputs(
    batch=2, length=33, shared=2, heads=4, keys=5, values=3, *, channelwise=False, sequences=None, decay=0.3, state=True, seed=0
):
    """Float64 arguments of gated_delta_rule by name: keys up to one in length, gains up to 1.99.

    Args:
        channelwise: g has an axis of channels.
        sequences: number of initial states, where it is not the batch.
        decay: typical -g.
        state: with an initial state.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=draw, dtype=torch.float64)

    k = normal(batch, length, shared, keys)
    k = k / k.norm(dim=-1, keepdim=True).clamp_min(1e-9) * uniform(batch, length, shared, 1)
    steps = (batch, length, heads)
    return {
        "q": normal(batch, length, shared, keys),
        "k": k,
        "v": normal(batch, length, heads, values),
        "g": -decay * normal(*steps, *[keys] * channelwise).exp(),
        "beta": 1.99 * uniform(*steps),
        "initial_state": normal(sequences or batch, heads, keys, values) if state else None,
    }


def evaluate(inputs, dtype, backend, *, call=gated_delta_rule, **options):
    """Outputs and the gradients of a random linear functional of (o, final states), by name.

    All but states get ``dtype``, unless it is None; states at least float32.
    """
    leaves = {}
    for name, tensor in inputs.items():
        if tensor is not None and dtype is not None:
            tensor = tensor.to(torch.promote_types(dtype, torch.float32) if name == "initial_state" else dtype)
        leaves[name] = None if tensor is None else tensor.detach().requires_grad_()
    o, last = call(**leaves, backend=backend, output_final_state=True, **options)
    return with_gradients(leaves, o=o, last=last)


def mixed_decays(inputs):
    """Some steps forget nothing, some nearly all, some all."""
    kinds = torch.tensor([0.0, -1e-4, -0.3, -20.0, -3.0, -300.0], dtype=torch.float64)
    draw = torch.Generator().manual_seed(3)
    return {**inputs, "g": kinds[torch.randint(len(kinds), inputs["g"].shape, generator=draw)]}
