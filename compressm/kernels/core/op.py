"""The record of an op: what it computes, what a call of given sizes looks like, and what that takes at the least.

The plan, ``compressm bench``, the session on a GPU, compilation ahead of time and the tests of correctness walk over the
records (``compressm.kernels.OPS``) and keep no lists of their own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compressm.kernels.core.plan import KernelPlan

WORD = 4  # bytes of a float32, in which parameters and states are kept


@dataclass(frozen=True)
class Cost:
    """The least that a computation takes.

    Attributes:
        bytes: to and from memory, every input read once and every output written once, by the forward and again by the
            backward; what lies between costs nothing, as if all were fused.
        flops: additions and multiplications alike, of the definition; what both passes need is computed once.
        exponentials: in both passes, as keeping one would move eight bytes, which takes longer on any machine of today.
    """

    bytes: int
    flops: int
    exponentials: int


@dataclass(frozen=True)
class Sample:
    """The arguments of a call.

    Attributes:
        tensors: by name, the differentiable ones (or, of an op without gradients, all).
        options: other arguments by name.
        axes: the axis, of every tensor and output that has one, along which the op treats slices independently, by what that
            axis is, e.g. ``{"batch": {"x": 0, "out": 0}}``.
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, dict[str, int]] = field(default_factory=dict)


Plan = Callable[[Mapping[str, tuple[int, ...]], torch.dtype, str, "str | None"], KernelPlan]
Function = Callable[[dict[str, Tensor]], Tensor]
Form = Callable[[Mapping[str, int], torch.dtype], Function]  # for sizes and a dtype


def compiled(form: Form) -> Form:
    """The same through torch.compile."""
    return lambda sizes, dtype: torch.compile(form(sizes, dtype), fullgraph=True, dynamic=False)


class Measured(NamedTuple):
    """A row of problems that ``make bench`` times in the same rounds, of one dtype.

    Attributes:
        sizes: of each.
        dtype: name; None: the op's first.
        backward_only: not the forward by itself.
    """

    sizes: tuple[Mapping[str, int], ...]
    dtype: str | None = None
    backward_only: bool = False


@dataclass(frozen=True)
class Op:
    """An op.

    Attributes:
        name: of its folder and its public function.
        title: heading in reports.
        about: one line for users.
        function: takes the tensors and options of a sample, and ``backend=``, whose ``"reference"`` runs in any precision.
        sizes: names of a problem's sizes, with the defaults of ``compressm bench``.
        small: awkward sizes, which tests try.
        draw: random arguments of (sizes, dtype, device), and keywords for variants.
        cost: of (sizes, bytes of an input's element, whether gradients are computed as well).
        plan: of (shapes by name, dtype, device type, backend or None), the shapes as in ``shapes``.
        shapes: the arguments whose shapes the plan depends on, with their axes, e.g. ``{"x": "(batch, D, L)"}``.
        returns: names of the outputs.
        writes: names of the tensors that are advanced in place.
        differentiable: whether gradients pass through it.
        dtypes: of its inputs, on compiled backends.
        rivals: what torch alone computes the same output with, by name: of (sizes, dtype) a function of the tensors.
        compiled: likewise, what torch.compile is given; None: the reference.
        measured: what ``make bench`` (False) and ``make bench-gpu`` (True) time; None: the default sizes.
        gpu: module with its cases for a GPU (:mod:`compressm.kernels.core.gpu`); None: it has no Triton form of its own.
    """

    name: str
    title: str
    about: str
    function: Callable[..., Any]
    sizes: Mapping[str, int]
    small: tuple[Mapping[str, int], ...]
    draw: Callable[..., Sample]
    cost: Callable[[Mapping[str, int], int, bool], Cost]
    plan: Plan
    shapes: Mapping[str, str]
    returns: tuple[str, ...] = ("out",)
    writes: tuple[str, ...] = ()
    differentiable: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    rivals: Mapping[str, Form] = field(default_factory=dict)
    compiled: Form | None = None
    measured: Callable[[bool], tuple[Measured, ...]] | None = None
    gpu: str | None = None

    def run(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any], backend: str | None = None) -> dict[str, Tensor]:
        """The outputs by name, those that are written in place last; None is no output."""
        found = self.function(**tensors, **options, backend=backend)
        outputs = found if isinstance(found, tuple) else (found,)
        named = {name: t for name, t in zip(self.returns, outputs, strict=False) if t is not None}
        return named | {name: tensors[name] for name in self.writes}

    def gpu_cases(self) -> Any:
        """The module ``gpu``, imported."""
        assert self.gpu is not None
        return importlib.import_module(self.gpu)
