"""What is looked at on a GPU, or compiled ahead of time for one, op by op: the contents of an op's module ``gpu``.

``machine_code(target)`` yields :class:`MachineCode`, ``checks(dtype)`` yields :class:`Check`, ``tunables()`` returns
:class:`Tunable`.  ``SMOKE`` is the check of a dry run without a GPU, ``SMALL`` are those that a sanitizer watches, ``LARGE``
those with more than 2^31 elements; ``forget()`` gives back what launches keep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

Config = dict[str, Any]
Shape = tuple[int, ...]
Call = Callable[[], tuple[Tensor, ...]]
FUSION = {"enable_fp_fusion": True}
BOUNDS = [0, 7, 7, 300, 1024, 1999, 2000]  # of packed sequences: one of none, one of one step, long ones


class Budget(NamedTuple):
    """What a kernel's machine code may have at most.

    Attributes:
        registers: of a lane.
        instructions: per element, in the loop that matters.
        spills: bytes, on AMD registers.
        conversions: of layouts.
    """

    registers: int
    instructions: float
    spills: int = 0
    conversions: int = 0


class MachineCode(NamedTuple):
    """A kernel with the types of its arguments and its constants, to be compiled ahead of time.

    Attributes:
        name: for tables.
        kernel: the Triton function.
        types: of its arguments.
        config: constants and options of the compiler.
        budget: for the target at hand.
        elements: what one turn of its loop, or without ``loop`` the whole kernel, handles per lane; None counts the float64
            operations.
        loop: whether it has one.
        inner: the loop, and the layouts that matter, are those of a loop within another.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    config: Config
    budget: Budget
    elements: int | None = None
    loop: bool = True
    inner: bool = False


class Check(NamedTuple):
    """A call whose outputs and gradients are compared with the float64 reference.

    Attributes:
        sizes: of the op.
        variant: keywords of its ``draw``.
        seen: a key of the sample's ``axes``: only the last slices along it are compared.
        last: how many.
        needs: how many last slices of the inputs they follow from; None: as many.
    """

    sizes: Mapping[str, int]
    variant: Mapping[str, Any] = {}
    seen: str = ""
    last: int = 1
    needs: int | None = None


@dataclass(frozen=True)
class Tunable:
    """A Triton kernel with the configurations to try.

    Attributes:
        name: begins with the op's.
        kernel: the Triton function, whose compiled forms tell registers and spills.
        code: name of its :class:`MachineCode`.
        configs: to try.
        shapes: to time, by name.
        small: the shape to check a configuration on.
        build: (shape, configuration or None for the planned one, device) -> a call that launches and returns the results.
        planned: shape -> the configuration that runs by default.
        least_bytes: that a launch moves.
        smoke: shape of a dry run without a GPU; None: not part of it.
        profiled: shape on which a profiler counts a launch; None: none.
        rivals: what torch alone does the same with, by name: of (shape, device).
        graph: a launch can be captured in a CUDA graph.
    """

    name: str
    kernel: Any
    code: str
    configs: tuple[Config, ...]
    shapes: Mapping[str, Shape]
    small: Callable[[Config], Shape]
    build: Callable[[Shape, Config | None, str], Call]
    planned: Callable[[Shape], Config]
    least_bytes: Callable[[Shape], int]
    smoke: Shape | None = None
    profiled: Shape | None = None
    rivals: dict[str, Callable[[Shape, str], Callable[[], object]]] = field(default_factory=dict)
    graph: bool = True


def by_target(target: Any, cuda: Budget, hip: Budget, sm_90: Budget | None = None) -> Budget:
    """The budget for a target: that of sm_90 where it is that and has one of its own, else that of its kind."""
    if target.backend != "cuda":
        return hip
    return sm_90 if sm_90 is not None and target.arch == 90 else cuda


def machine_code_of(
    target: Any, types_of: Callable[[Any, str], dict[str, str]], budgets: Mapping[str, tuple[Budget, ...]]
) -> Callable[..., MachineCode]:
    """What makes :class:`MachineCode` of (name, kernel, dtype, config, elements, loop).

    types_of is of (kernel, dtype); budgets, by name, are as :func:`by_target` takes them.
    """

    def case(name: str, kernel: Any, dtype: str, config: Config, elements: int, loop: bool = True) -> MachineCode:
        return MachineCode(name, kernel, types_of(kernel, dtype), config, by_target(target, *budgets[name]), elements, loop)

    return case
