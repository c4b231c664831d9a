"""What all contenders of a group share: the inputs, the float64 answer, the counts, and how an answer is judged."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compressm.benchmarking.results import Counts, Level, Pass
from compressm.benchmarking.timing import Timed

# Largest relative error (2-norm of the difference over the 2-norm of the answer) of any output or gradient.  Wide enough for
# other summation orders, far too narrow for a wrong formula; the error itself is reported beside every time.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 5e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
SLAB_CELLS = {"cpu": 1 << 24, "cuda": 1 << 28}  # states that a reference may keep for its backward, some 32 bytes each
Answers = dict[str, Tensor]
Function = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to compute a problem's answer.

    Attributes:
        timed: what the clock sees.
        answers: one computation's outputs and gradients by name, of any real dtype, for the gate.
        warms: whether ``answers`` runs what is timed, so that whatever is compiled or allocated once is there afterwards.
    """

    timed: Timed
    answers: Callable[[], Answers]
    warms: bool = True


@dataclass(frozen=True)
class Problem:
    """A case at hand: its tensors and its answer.

    Attributes:
        passes: what is computed.
        dtype, device: of the inputs.
        inputs: by name; with a backward they are leaves that require gradients.
        weight: gradient of the output that a backward starts from; None without one.
        oracle: float64 answers by name: ``"out"`` and, with a backward, every input's gradient under the input's name.
        counts: the least that it takes.
        sizes: by name, as in the case.
        extras: what else a contender of this op needs, by name.
        built_in: makers of the contenders that come with the package; ``"compressm"`` is the first.
    """

    passes: Pass
    dtype: torch.dtype
    device: torch.device
    inputs: dict[str, Tensor]
    weight: Tensor | None
    oracle: Answers
    counts: Counts
    sizes: Mapping[str, int]
    extras: dict[str, Any] = field(default_factory=dict)
    built_in: dict[str, Callable[[], Contender]] = field(default_factory=dict)

    @property
    def backward(self) -> bool:
        """Whether gradients are part of the answer."""
        return self.passes == "forward+backward"

    def contender(self, function: Function) -> Contender:
        """From a torch function of the inputs; without a backward it runs without autograd."""
        if not self.backward:
            names = ["out"]

            @torch.no_grad()
            def run() -> tuple[Tensor, ...]:
                return (function(self.inputs),)
        else:
            leaves = list(self.inputs.values())

            def run() -> tuple[Tensor, ...]:
                out = function(self.inputs)
                return (out, *torch.autograd.grad(out, leaves, self.weight))

            names = ["out", *self.inputs]
        return Contender(Timed(run), lambda: dict(zip(names, (t.detach() for t in run()), strict=True)))

    def error(self, answers: Answers) -> float:
        """Largest relative error of any answer; infinite where one is missing, has another shape or is not finite."""
        worst = 0.0
        for name, expected in self.oracle.items():
            actual = answers.get(name)
            if actual is None or actual.shape != expected.shape:
                return float("inf")
            difference = (actual.to(expected.device, expected.dtype) - expected).norm()
            relative = float(difference / expected.norm().clamp_min(1e-30))
            worst = max(worst, relative if relative == relative else float("inf"))
        return worst

    @property
    def tolerance(self) -> float:
        """See TOLERANCES."""
        return TOLERANCES[self.dtype]


@dataclass(frozen=True)
class Op:
    """What can be measured.

    Attributes:
        level: op, layer, step or reduction.
        sizes: names of its sizes and the defaults of the command line.
        passes: that it has.
        build: (sizes, passes, dtype, device) -> Problem.
        about: one line for users.
        dtype: name of the dtype where none is named.
        rivals: of its contenders, what torch itself has for it.
    """

    level: Level
    sizes: Mapping[str, int]
    passes: tuple[Pass, ...]
    build: Callable[[Mapping[str, int], Pass, torch.dtype, torch.device], Problem]
    about: str
    dtype: str = "float32"
    rivals: tuple[str, ...] = ()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def in_slabs(
    function: Function, inputs: dict[str, Tensor], weight: Tensor | None, axes: Mapping[str, int], along: int, slabs: int
) -> Answers:
    """Output and gradients in float64 of a function that treats slices independently, a slab at a time.

    Args:
        function: of the inputs, in float64.
        inputs: any dtype.
        weight: gradient of the output, or None for no gradients.
        axes: axis of every input that is sliced; gradients of the others are summed.
        along: axis of the output and of ``weight``.
        slabs: how many.
    """
    first = next(iter(axes))
    bounds = torch.linspace(0, inputs[first].shape[axes[first]], slabs + 1).round().long().tolist()
    outputs: list[Tensor] = []
    gradients: dict[str, list[Tensor]] = {name: [] for name in inputs}
    for start, stop in itertools.pairwise(bounds):
        part = {
            name: (t.detach().narrow(axes[name], start, stop - start) if name in axes else t.detach()).to(_wide(t))
            for name, t in inputs.items()
        }
        for t in part.values():
            t.requires_grad_(weight is not None)
        with torch.set_grad_enabled(weight is not None):
            out = function(part)
        outputs.append(out.detach())
        if weight is not None:
            found = torch.autograd.grad(out, list(part.values()), weight.narrow(along, start, stop - start).to(_wide(weight)))
            for name, gradient in zip(part, found, strict=True):
                gradients[name].append(gradient)
    answers = {"out": torch.cat(outputs, along)}
    if weight is not None:
        for name, parts in gradients.items():
            answers[name] = torch.cat(parts, axes[name]) if name in axes else torch.stack(parts).sum(0)
    return answers


def leaves(tensors: dict[str, Tensor], passes: Pass) -> dict[str, Tensor]:
    """The tensors, requiring gradients where the pass has a backward."""
    return {name: t.detach().requires_grad_(passes == "forward+backward") for name, t in tensors.items()}


def slabs_for(cells: int, most: int, device: torch.device) -> int:
    """How many slabs keep the states that each holds within a device's memory, at most ``most``."""
    return max(1, min(most, -(-cells // SLAB_CELLS[device.type])))

