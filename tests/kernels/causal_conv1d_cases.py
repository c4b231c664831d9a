"""Inputs of the short causal convolution and one evaluation of outputs and gradients, shared by the tests of its backends."""

from __future__ import annotations

import torch

from compressm.kernels import causal_conv1d

LAYOUTS = ("steps", "channels", "channel slice", "step slice", "odd")


def lay_out(x, layout):
    """x (batch, D, L) with its values in another place: see LAYOUTS; slices are halves of a wider tensor."""
    batch, channels, length = x.shape
    if layout == "channels":
        return x.mT.contiguous().mT
    if layout == "channel slice":
        wide = torch.full((batch, length, 2 * channels), float("nan"), dtype=x.dtype, device=x.device)
        home = wide[..., channels:].mT
    elif layout == "step slice":
        wide = torch.full((batch, 2 * channels, length + 3), float("nan"), dtype=x.dtype, device=x.device)
        home = wide[:, :channels, 3:]
    elif layout == "odd":
        home = torch.full((channels, length, batch, 2), float("nan"), dtype=x.dtype, device=x.device)[..., 1].permute(2, 0, 1)
    else:
        return x.contiguous()
    home.copy_(x)
    return home


def random_inputs(batch=2, channels=3, length=33, width=4, *, without=(), sequences=None, seed=0):
    """Float64 tensors of causal_conv1d by name, exact in float32; sequences: number of states, where it is not the batch."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw).double()

    inputs = {
        "x": normal(batch, channels, length),
        "weight": normal(channels, width),
        "bias": normal(channels),
        "initial_states": normal(sequences or batch, channels, width - 1),
    }
    return {name: None if name in without else tensor for name, tensor in inputs.items()}


def evaluate(
    inputs, dtype, backend, *, layout="steps", activation="silu", device="cpu", call=causal_conv1d, final=True, **options
):
    """Outputs and the gradients of a random linear functional of them, all on the CPU, by name.

    Args:
        final: ask for the final states as well.
        options: further arguments of the call.
    """
    leaves = {name: None if t is None else t.to(device, dtype, copy=True) for name, t in inputs.items()}
    leaves["x"] = lay_out(leaves["x"], layout)
    present = {name: tensor.requires_grad_() for name, tensor in leaves.items() if tensor is not None}
    options = {name: t.to(device) for name, t in options.items()}
    outputs = call(**leaves, activation=activation, return_final_states=final, backend=backend, **options)
    outputs = dict(zip(("out", "last"), outputs if final else (outputs,), strict=False))
    draw = torch.Generator().manual_seed(7)
    weights = [torch.randn(t.shape, generator=draw, dtype=torch.float64).to(t.device, t.dtype) for t in outputs.values()]
    weights[0] = lay_out(weights[0], layout)
    loss = sum((t * weight).sum() for t, weight in zip(outputs.values(), weights, strict=True))
    gradients = torch.autograd.grad(loss, list(present.values()))
    results = {**outputs, **dict(zip(present, gradients, strict=True))}
    return {name: tensor.detach().cpu() for name, tensor in results.items()}


def check(results, oracle, assert_close, dtype):
    """Every result of ``evaluate`` within the table for ``dtype``."""
    assert set(results) == set(oracle)
    for name, expected in oracle.items():
        assert_close(results[name].to(torch.float64), expected, name, dtype)
