"""One call of an op, and one evaluation of it: outputs, and the gradients of a random functional of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compressm.kernels.core.gpu import Check
from compressm.kernels.core.op import Op

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


def problem(op: Op, check: Check, dtype: torch.dtype, device: str) -> Problem:
    """The call that a check describes."""
    sample = op.draw(check.sizes, dtype, torch.device(device), **check.variant)

    def last(name: str, axis: int, count: int) -> Index:
        size = sample.tensors[name].shape[axis] if name in sample.tensors else count
        return (*[slice(None)] * axis, slice(-min(count, size), None))

    axes = sample.axes[check.seen] if check.seen else {}
    given = {name: axis for name, axis in axes.items() if name in sample.tensors}
    outputs = {name: axis for name, axis in axes.items() if name not in given or name in op.writes}
    return Problem(
        sample.tensors,
        lambda tensors, backend: op.run(tensors, sample.options, backend),
        op.differentiable,
        {name: last(name, axis, check.needs or check.last) for name, axis in given.items()},
        {name: last(name, axis, check.last) for name, axis in outputs.items()},
    )
