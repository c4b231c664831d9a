"""What else in the process still runs on the weights that a reduction replaces.

Python's garbage collector knows every module and function that is alive.  A reduction is rare, so it can afford to look.
"""

from __future__ import annotations

import gc
import types
import warnings
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from compressm.compression.common.memory import is_shared
from compressm.errors import ModelError

GRAPHED = "make_graphed_callables.<locals>"  # where torch.cuda.make_graphed_callables defines its closures


class StaleCopyWarning(UserWarning):
    """Something outside the model keeps the weights from before a reduction."""


def check_copies(
    model: nn.Module,
    swapped: Mapping[str, tuple[Tensor, Tensor]],
    ema: nn.Module | MutableMapping[str, Tensor] | None,
    optimizers: Iterable[torch.optim.Optimizer] = (),
) -> None:
    """Look for everything alive that would go on with the weights from before a reduction.

    Seen are callables from ``torch.cuda.make_graphed_callables`` and other CUDA graphs, modules outside the model that hold
    its parameters (``torch.jit.trace``, ``torch.export``, ``torch.fx``, ties), an ``AveragedModel`` into which the next
    update would broadcast, optimizers that do not follow, and memory shared with other processes.  Not seen are plain lists
    and dicts: clipping lists, averages kept by hand that are not passed as ``ema``.

    Args:
        model: the plain model, not yet reduced.
        swapped: parameter name to old and new parameter.
        ema: the averaged copy that follows.
        optimizers: those that follow.

    Raises:
        ModelError: a graphed callable was captured with replaced parameters: training would go on with the old weights.

    Warns:
        StaleCopyWarning: for each of the others.
    """
    names = {id(old): name for name, (old, _) in swapped.items()}

    def look() -> tuple[list[str], list[str]]:
        functions, modules, alive, graphs = _alive(types.FunctionType, nn.Module, torch.optim.Optimizer, torch.cuda.CUDAGraph)
        inside = {id(module._parameters) for module in model.modules()}
        outside = [module for module in modules if id(vars(module).get("_parameters")) not in inside]
        held = {module: [n for p in own_parameters(module) if (n := names.get(id(p)))] for module in outside}
        messages = _about_holders(held)
        messages += _about_averages(model, swapped.values(), [m for m in modules if m is not ema])
        messages += _about_optimizers(names, alive, optimizers)
        if graphs and any(old.is_cuda for old, _ in swapped.values()):
            messages.append(
                f"{len(graphs)} CUDA graphs that were captured before this reduction are alive; replaying one that runs this "
                "model goes on with the old weights. Capture it again (torch.compile does so by itself)"
            )
        return _graphed(functions, names), messages

    graphed, messages = look()
    if graphed or messages:
        gc.collect()  # what nobody can reach any more goes on with nothing
        graphed, messages = look()
    if graphed:
        raise ModelError(
            f"parameters {_some(graphed)} are part of a CUDA graph (torch.cuda.make_graphed_callables), which would go on with "
            "the old weights, expected a model without. Capture after the last reduction, or build the module anew from its "
            "state_dict and delete the graphed one"
        )
    for message in messages + _about_shared({name: old for name, (old, _) in swapped.items()}):
        _warn(message)


def check_optimizers_outside(names: Mapping[int, str], optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Look for optimizers alive that would go on with replaced parameters.

    Args:
        names: id of a parameter that will be replaced, to its name.
        optimizers: those that follow.

    Warns:
        StaleCopyWarning: names them.
    """

    def look() -> list[str]:
        (alive,) = _alive(torch.optim.Optimizer)
        return _about_optimizers(names, alive, optimizers)

    if look():
        gc.collect()
        for message in look():
            _warn(message)


def closure_of(function: types.FunctionType) -> dict[str, Any]:
    """Names and values of the variables that a function closes over, those that are set."""
    values = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            values[name] = cell.cell_contents
        except ValueError:  # not set yet
            continue
    return values


def _graphed(functions: Iterable[types.FunctionType], names: Mapping[int, str]) -> list[str]:
    """Names of the parameters that graphed callables were captured with."""
    return [
        names[id(p)]
        for function in functions
        if function.__module__ == "torch.cuda.graphs" and function.__qualname__.startswith(GRAPHED)
        for p in closure_of(function).get("module_params", ())
        if id(p) in names
    ]


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """A module's own parameters, also those that a traced module keeps in C++; none before its ``__init__``."""
    return [p for p in getattr(module, "_parameters", {}).values() if p is not None]


def _about_holders(held: Mapping[nn.Module, list[str]]) -> list[str]:
    holders = sorted({type(module).__name__ for module, names in held.items() if names})
    if not holders:
        return []
    return [
        f"outside the model, {_some(holders)} holds {_some(sorted({name for names in held.values() for name in names}))}: "
        "a traced, exported or tied copy, which keeps the old weights. Make it again after the reduction"
    ]


def _about_averages(model: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]], modules: Iterable[nn.Module]) -> list[str]:
    """Updating with other shapes fails loudly in torch, except where all new shapes broadcast into the old ones."""
    if not all(_broadcasts(new.shape, old.shape) for old, new in pairs):
        return []
    shapes = [p.shape for p in model.parameters()]
    return [
        "an AveragedModel of this model's shapes was not passed as ema=; its next update would broadcast the one "
        "state that is left into all old ones, silently. Pass it as ema=, or build it anew"
        for module in modules
        if isinstance(module, torch.optim.swa_utils.AveragedModel) and [p.shape for p in module.parameters()] == shapes
    ]


def _about_optimizers(
    names: Mapping[int, str], alive: Iterable[torch.optim.Optimizer], optimizers: Iterable[torch.optim.Optimizer]
) -> list[str]:
    """Wrappers of an optimizer (accelerate's) share the lists in its groups: who follows is known by these."""
    followed = {id(group["params"]) for optimizer in optimizers for group in optimizer.param_groups}
    held: dict[str, set[str]] = {}
    for optimizer in alive:
        for group in getattr(optimizer, "param_groups", ()):  # none before its __init__
            if id(group["params"]) not in followed and (hit := {names[id(p)] for p in group["params"] if id(p) in names}):
                held.setdefault(type(optimizer).__name__, set()).update(hit)
    if not held:
        return []
    return [
        f"{_some(sorted(held))} holds {_some(sorted(set().union(*held.values())))} and was not passed along: its next steps "
        "would train the old parameters, which the model does not use any more. Pass it as optimizer=, or build it anew "
        "afterwards; where training is over, let go of it first"
    ]


def _about_shared(parameters: Mapping[str, Tensor]) -> list[str]:
    shared = sorted(name for name, parameter in parameters.items() if is_shared(parameter))
    if not shared:
        return []
    return [
        f"{_some(shared)} lie in memory shared between processes (share_memory); the new ones do as well, but other processes "
        "go on with the old ones. Hand them the model again after the reduction"
    ]


def _broadcasts(new: torch.Size, old: torch.Size) -> bool:
    return new != old and len(new) == len(old) and all(n in (1, o) for n, o in zip(new, old, strict=True))


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"


def _warn(message: str) -> None:
    warnings.warn(message, StaleCopyWarning, stacklevel=6)


def _alive(*classes: type) -> list[list[Any]]:
    """For each class, its instances that the garbage collector tracks."""
    wanted = [_subclasses(cls) for cls in classes]
    anyone = frozenset().union(*wanted)
    items = [item for item in gc.get_objects() if type(item) in anyone]  # not __class__: lazy proxies load modules for it
    return [[item for item in items if type(item) in kinds] for kinds in wanted]


def _subclasses(cls: type) -> frozenset[type]:
    return frozenset({cls}).union(*map(_subclasses, type.__subclasses__(cls)))
