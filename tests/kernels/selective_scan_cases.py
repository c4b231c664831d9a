"""Inputs of the selective scan and one evaluation of outputs and gradients, shared by the tests of its backends."""

from __future__ import annotations

import torch
from kernels.evaluation import normals, with_gradients

from compressm.kernels import selective_scan

TENSORS = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"]


def random_inputs(
    batch=2, channels=3, length=33, states=5, groups=1, *, sequences=None, without=(), constant=(), channels_last=False, seed=0
):
    """Float64 arguments of selective_scan by name.

    Args:
        sequences: number of initial states, where it is not the batch.
        without: names of optional arguments to leave out.
        constant: names among B and C that have no time axis.
        channels_last: (batch, D, L) tensors that lie in memory as (batch, L, D).
    """
    normal = normals(seed)
    def wide():
        return normal(batch, length, channels).transpose(1, 2) if channels_last else normal(batch, channels, length)

    def mixing(name):
        return normal(channels, states) if name in constant else normal(batch, groups, states, length)

    inputs = {
        "u": wide(),
        "delta": wide(),
        "A": -(torch.arange(states) + 1.0) * torch.exp(0.1 * normal(channels, states)),
        "B": mixing("B"),
        "C": mixing("C"),
        "D": normal(channels),
        "z": wide(),
        "delta_bias": normal(channels) - 4.0,
        "initial_state": normal(sequences or batch, channels, states),
    }
    return {name: None if name in without else tensor for name, tensor in inputs.items()}


def evaluate(inputs, dtype, backend, *, device="cpu", call=selective_scan, **options):
    """Outputs and the gradients of a random linear functional of (out, last state), all on the CPU, by name.

    u, delta, B, C and z get ``dtype``; parameters and states at least float32.
    """
    parameters = torch.promote_types(dtype, torch.float32)
    leaves = {
        name: None
        if tensor is None
        else tensor.to(device, parameters if name in ("A", "D", "delta_bias", "initial_state") else dtype)
        .detach()
        .requires_grad_()
        for name, tensor in inputs.items()
    }
    options = {"delta_softplus": True, "return_last_state": True, **options}
    out, last = call(**leaves, backend=backend, **options)
    return with_gradients(leaves, out=out, last=last)
