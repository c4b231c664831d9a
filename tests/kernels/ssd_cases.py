"""Inputs of Mamba-2's scan and one evaluation of outputs and gradients, shared by the tests of its backends."""

from __future__ import annotations

import torch
from kernels.evaluation import normals, with_gradients

from compressm.kernels import ssd

TENSORS = ["x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states"]
PARAMETERS = ("A", "D", "dt_bias", "initial_states")
GOLDEN = ["ssd_B1_L130_H2_P5_G1_N13", "ssd_B1_L33_H3_P16_G3_N100", "ssd_B2_L65_H4_P8_G2_N16"]


def random_inputs(
    batch=2, length=33, heads=4, channels=3, groups=2, states=5, *, sequences=None, without=(), wide_skip=False, seed=0
):
    """Float64 arguments of ssd by name.

    Args:
        sequences: number of initial states, where it is not the batch.
        without: names of optional arguments to leave out.
        wide_skip: D is (H, P).
    """
    normal = normals(seed)
    inputs = {
        "x": normal(batch, length, heads, channels),
        "dt": normal(batch, length, heads),
        "A": -torch.exp(normal(heads)),
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
        "D": normal(heads, channels) if wide_skip else normal(heads),
        "z": normal(batch, length, heads, channels),
        "dt_bias": normal(heads) - 2.0,
        "initial_states": normal(sequences or batch, heads, channels, states),
    }
    return {name: None if name in without else tensor for name, tensor in inputs.items()}


def evaluate(inputs, dtype, backend, *, device="cpu", call=ssd, **options):
    """Outputs and the gradients of a random linear functional of (out, final states), all on the CPU, by name.

    x, dt, B, C and z get ``dtype``, unless it is None; parameters and states at least float32.
    """
    leaves = {}
    for name, tensor in inputs.items():
        if tensor is not None and dtype is not None:
            tensor = tensor.to(torch.promote_types(dtype, torch.float32) if name in PARAMETERS else dtype)
        leaves[name] = None if tensor is None else tensor.to(device).detach().requires_grad_()
    options = {"dt_softplus": True, "return_final_states": True, **options}
    out, last = call(**leaves, backend=backend, **options)
    return with_gradients(leaves, out=out, last=last)


def numbered(length, *starts):
    """seq_idx (len(starts), L): in each row, the number of sequences that have begun, each where its starts say."""
    steps = torch.arange(length)
    return torch.stack([(steps[:, None] >= torch.tensor(row)).sum(1) for row in starts]).int()
