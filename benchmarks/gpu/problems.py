"""Inputs of every op at any size, and one evaluation of it: outputs, and the gradients of a random functional of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compressm import kernels

Tensors = dict[str, Tensor]
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Problem:
    """One call of an op.

    Attributes:
        inputs: by name.
        call: (inputs, backend) -> outputs by name.
        differentiable: gradients belong to the answer.
        part: what of an input the reference gets, by name; whole where absent.
        seen: what of an output enters the functional and is compared, by name, in slices from the end, so that they mean the
            same of the reference's outputs.
    """

    inputs: Tensors
    call: Callable[[Tensors, str], Tensors]
    differentiable: bool = True
    part: dict[str, Index] = field(default_factory=dict)
    seen: dict[str, Index] = field(default_factory=dict)


def evaluate(problem: Problem, inputs: Tensors, backend: str, weights: Tensors | None = None) -> tuple[Tensors, Tensors]:
    """(outputs and gradients by name, weights of the outputs that gave them).

    weights: of another evaluation, to take again; they may be larger than the outputs, as ``seen`` counts from the end.
    """
    leaves = {name: t.detach().clone() if not problem.differentiable else t.detach() for name, t in inputs.items()}
    if not problem.differentiable:
        with torch.no_grad():
            return problem.call(leaves, backend), {}
    for leaf in leaves.values():
        leaf.requires_grad_()
    outputs = problem.call(leaves, backend)
    drawn = {name: t for name, t in (weights or {}).items()}
    gradients = {}
    for name, out in outputs.items():
        seen = problem.seen.get(name, ())
        if name not in drawn:
            drawn[name] = torch.randn(out[seen].shape, device=out.device, dtype=torch.float32).to(out.dtype)
        gradients[name] = torch.zeros_like(out)
        gradients[name][seen] = drawn[name].to(out.dtype)
    found = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), [gradients[name] for name in outputs],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    results = {name: t.detach() for name, t in outputs.items()}
    return results | {f"grad {name}": t for name, t in zip(leaves, found, strict=True)}, drawn


def selective_scan(
    batch: int, channels: int, length: int, states: int, dtype: torch.dtype, device: str, *,
    groups: int = 1, channels_last: bool = False, bounds: list[int] | None = None, bare: bool = False, seen: str = "",
) -> Problem:  # fmt: skip
    """Steps of 1e-3 to 1e-1 as a Mamba layer begins with.

    bounds: cu_seqlens; bare: without D, gate, bias and initial state; seen: ``"batch"`` or ``"channels"``, look at the last
    sequence or the last channels only.
    """

    def wide() -> Tensor:
        shape = (batch, length, channels) if channels_last else (batch, channels, length)
        t = torch.randn(shape, device=device, dtype=dtype)
        return t.transpose(1, 2) if channels_last else t

    sequences = batch if bounds is None else len(bounds) - 1
    inputs = {
        "u": wide(),
        "delta": wide().mul_(0.3),
        "A": -torch.arange(1.0, states + 1, device=device).repeat(channels, 1),
        "B": torch.randn(batch, groups, states, length, device=device, dtype=dtype),
        "C": torch.randn(batch, groups, states, length, device=device, dtype=dtype),
    }
    if bare:
        inputs["delta"] = inputs["delta"].abs_().mul_(0.1)
    else:
        inputs |= {
            "D": torch.randn(channels, device=device),
            "z": wide(),
            "delta_bias": torch.exp(torch.empty(channels, device=device).uniform_(-6.9, -2.3)).expm1().log(),
            "initial_state": torch.randn(sequences, channels, states, device=device),
        }
    packing = None if bounds is None else torch.tensor(bounds, device=device, dtype=torch.int32)

    def call(p: Tensors, backend: str) -> Tensors:
        out, last = kernels.selective_scan(
            **p, delta_softplus=not bare, return_last_state=True, cu_seqlens=packing, backend=backend
        )
        return {"out": out, "last": last}

    whole = slice(None)
    if seen == "batch":
        names, index = ("u", "delta", "B", "C", "z", "initial_state", "out", "last"), (slice(-1, None),)
        part = dict.fromkeys(names, index)
    elif seen == "channels":
        few = slice(-min(16, channels), None)
        part = dict.fromkeys(("u", "delta", "z", "initial_state", "out", "last"), (whole, few))
        part |= dict.fromkeys(("A", "D", "delta_bias"), (few,))
    else:
        part = {}
    return Problem(inputs, call, part=part, seen={name: part[name] for name in ("out", "last") if name in part})


def diagonal_scan(
    batch: int, length: int, states: int, dtype: torch.dtype, device: str, *,
    reverse: bool = False, bare: bool = False, seen: str = "", fastest: float = 0.2,
) -> Problem:  # fmt: skip
    """Moduli in [exp(-fastest), 1]; seen: ``"batch"``, the last sequence, or ``"time"``, the last 64 steps, which forget the
    first ones (moduli at most exp(-0.02) then)."""
    decay = -fastest * torch.rand(states, device=device)
    inputs = {
        "x": torch.randn(batch, length, 2 * states, device=device, dtype=dtype),
        "log_decay": decay if seen != "time" else decay - 0.02,
        "phase": 6 * torch.rand(states, device=device),
    }
    if not bare:
        inputs["initial_state"] = torch.randn(batch, 2 * states, device=device)

    def call(p: Tensors, backend: str) -> Tensors:
        return {"h": kernels.diagonal_scan(**p, reverse=reverse, backend=backend)}

    part, index = {}, (slice(-1, None),)
    if seen == "batch":
        part = {"x": index, "initial_state": index}
    elif seen == "time":
        assert bare
        assert not reverse
        part, index = {"x": (slice(None), slice(-2048, None))}, (slice(None), slice(-64, None))
    return Problem(inputs, call, part=part, seen={"h": index} if seen else {})


def lti_scan(batch: int, length: int, channels: int, states: int, dtype: torch.dtype, device: str) -> Problem:
    """With projections and feedthrough, whatever form the plan chooses."""
    normal = torch.randn
    inputs = {
        "u": normal(batch, length, channels, device=device).to(dtype),
        "log_decay": -0.1 * torch.rand(states, device=device) - 1e-3,
        "phase": 6 * torch.rand(states, device=device),
        **{name: normal(states, channels, device=device) / channels**0.5 for name in ("B_re", "B_im")},
        **{name: normal(channels, states, device=device) / states**0.5 for name in ("C_re", "C_im")},
        "D": normal(channels, device=device),
    }
    return Problem(inputs, lambda p, backend: {"y": kernels.lti_scan_planar(**p, backend=backend)})


def causal_conv1d(
    batch: int, channels: int, length: int, width: int, dtype: torch.dtype, device: str, *,
    channels_last: bool = False, silu: bool = True, seen: str = "",
) -> Problem:  # fmt: skip
    """With bias and initial state."""
    shape = (batch, length, channels) if channels_last else (batch, channels, length)
    x = torch.randn(shape, device=device, dtype=dtype)
    inputs = {
        "x": x.transpose(1, 2) if channels_last else x,
        "weight": torch.randn(channels, width, device=device),
        "bias": torch.randn(channels, device=device),
        "initial_states": torch.randn(batch, channels, width - 1, device=device),
    }

    def call(p: Tensors, backend: str) -> Tensors:
        return {"out": kernels.causal_conv1d(**p, activation="silu" if silu else None, backend=backend)}

    index = (slice(-1, None),)
    part = {"x": index, "initial_states": index} if seen == "batch" else {}
    return Problem(inputs, call, part=part, seen={"out": index} if seen else {})


def state_update(
    batch: int, channels: int, states: int, dtype: torch.dtype, device: str, *, groups: int = 1, seen: str = ""
) -> Problem:
    """The state in float32, as models keep it."""
    normal = torch.randn
    inputs = {
        "state": normal(batch, channels, states, device=device),
        **{name: normal(batch, channels, device=device).to(dtype) for name in ("x", "dt", "z")},
        "A": -torch.arange(1.0, states + 1, device=device).repeat(channels, 1),
        **{name: normal(batch, groups, states, device=device).to(dtype) for name in ("B", "C")},
        "D": normal(channels, device=device),
        "dt_bias": normal(channels, device=device) - 4.0,
    }

    def call(p: Tensors, backend: str) -> Tensors:
        out = kernels.selective_state_update(**p, dt_softplus=True, backend=backend)
        return {"out": out, "state": p["state"]}

    part = dict.fromkeys(("state", "x", "dt", "z", "B", "C"), (slice(-1, None),)) if seen else {}
    seen_outputs = {name: (slice(-1, None),) for name in ("out", "state")} if seen else {}
    return Problem(inputs, call, False, part, seen_outputs)


def gramians(count: int, states: int, inputs: int, device: str, *, seen: str = "") -> Problem:
    """``count`` systems of one shape."""
    draw: dict[str, Any] = {"device": device, "dtype": torch.complex128}
    decay = -0.1 * torch.rand(count, states, device=device, dtype=torch.float64) - 1e-4
    tensors = {
        "log_lam": torch.complex(decay, 6 * torch.rand(count, states, device=device, dtype=torch.float64)),
        "B": torch.randn(count, states, inputs, **draw),
        "C": torch.randn(count, inputs, states, **draw),
    }
    index = (slice(-1, None),)
    part = dict.fromkeys(tensors, index) if seen else {}

    def call(p: Tensors, backend: str) -> Tensors:
        return kernels.gramians(**p, backend=backend)._asdict()

    return Problem(tensors, call, False, part, dict.fromkeys(("P", "S", "Q", "S_Q"), index) if seen else {})
