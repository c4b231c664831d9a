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

from compressm.errors import ModelError

GRAPHED = "make_graphed_callables.<locals>"  # where torch.cuda.make_graphed_callables defines its closures


class StaleCopyWarning(UserWarning):
    """Something outside the model keeps the weights from before a reduction."""


def check_copies(
    model: nn.Module, swapped: Mapping[str, tuple[Tensor, Tensor]], ema: nn.Module | MutableMapping[str, Tensor] | None
) -> None:
    """Look for everything alive that would go on with the weights from before a reduction.

    Seen are callables from ``torch.cuda.make_graphed_callables`` and other CUDA graphs, modules outside the model that hold
    its parameters (``torch.jit.trace``, ``torch.export``, ``torch.fx``, ties), and an ``AveragedModel`` into which the next
    update would broadcast.  Not seen are plain lists and dicts: clipping lists, averages kept by hand that are not passed
    as ``ema``.

    Args:
        model: the plain model, not yet reduced.
        swapped: parameter name to old and new parameter.
        ema: the averaged copy that follows.

    Raises:
        ModelError: a graphed callable was captured with replaced parameters: training would go on with the old weights.

    Warns:
        StaleCopyWarning: for each of the others.
    """
    names = {id(old): name for name, (old, _) in swapped.items()}
    functions, modules, graphs = _alive(types.FunctionType, nn.Module, torch.cuda.CUDAGraph)
    for function in functions:
        if function.__module__ == "torch.cuda.graphs" and function.__qualname__.startswith(GRAPHED):
            _check_graphed([names[id(p)] for p in closure_of(function).get("module_params", ()) if id(p) in names])
    inside = {id(module._parameters) for module in model.modules()}
    outside = [module for module in modules if id(vars(module).get("_parameters")) not in inside]
    _warn_holders({module: [n for p in own_parameters(module) if (n := names.get(id(p)))] for module in outside})
    _warn_averages(model, swapped.values(), [m for m in modules if m is not ema])
    if graphs and any(old.is_cuda for old, _ in swapped.values()):
        _warn(
            f"{len(graphs)} CUDA graphs that were captured before this reduction are alive; replaying one that runs this "
            "model goes on with the old weights. Capture it again (torch.compile does so by itself)"
        )


def closure_of(function: types.FunctionType) -> dict[str, Any]:
    """Names and values of the variables that a function closes over, those that are set."""
    values = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            values[name] = cell.cell_contents
        except ValueError:  # not set yet
            continue
    return values


def _check_graphed(hit: list[str]) -> None:
    if hit:
        raise ModelError(
            f"parameters {_some(hit)} are part of a CUDA graph (torch.cuda.make_graphed_callables), which would go on with "
            "the old weights, expected a model without. Capture after the last reduction, or build the module anew from its "
            "state_dict and delete the graphed one"
        )


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """A module's own parameters, also those that a traced module keeps in C++; none before its ``__init__``."""
    return [p for p in getattr(module, "_parameters", {}).values() if p is not None]


def _warn_holders(held: Mapping[nn.Module, list[str]]) -> None:
    holders = sorted({type(module).__name__ for module, names in held.items() if names})
    if holders:
        _warn(
            f"outside the model, {_some(holders)} holds {_some(sorted({name for names in held.values() for name in names}))}: "
            "a traced, exported or tied copy, which keeps the old weights. Make it again after the reduction"
        )


def _warn_averages(model: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]], modules: Iterable[nn.Module]) -> None:
    """Updating with other shapes fails loudly in torch, except where all new shapes broadcast into the old ones."""
    if not all(_broadcasts(new.shape, old.shape) for old, new in pairs):
        return
    shapes = [p.shape for p in model.parameters()]
    for module in modules:
        if isinstance(module, torch.optim.swa_utils.AveragedModel) and [p.shape for p in module.parameters()] == shapes:
            _warn(
                "an AveragedModel of this model's shapes was not passed as ema=; its next update would broadcast the one "
                "state that is left into all old ones, silently. Pass it as ema=, or build it anew"
            )


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
