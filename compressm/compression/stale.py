"""What else in the process still runs on the weights that a reduction replaces.

Python's garbage collector knows every module and function that is alive.  A reduction is rare, so it can afford to look.
"""

from __future__ import annotations

import gc
import types
import warnings
from collections.abc import Iterator, Mapping, MutableMapping

import torch
from torch import Tensor, nn

from compressm.errors import ModelError

GRAPHED = "make_graphed_callables.<locals>"  # where torch.cuda.make_graphed_callables defines its closures


class StaleCopyWarning(UserWarning):
    """Something outside the model keeps the weights from before a reduction."""


def check_graphs(replaced: Mapping[str, Tensor]) -> None:
    """Refuse parameters that a callable from ``torch.cuda.make_graphed_callables`` was captured with.

    The captured graph reads the parameters' old memory for ever: training would go on without the reduction, silently.

    Raises:
        ModelError: names the parameters.
    """
    names = {id(p): name for name, p in replaced.items()}
    for function in _alive(types.FunctionType):
        if function.__qualname__.startswith(GRAPHED):
            captured = closure_of(function).get("module_params", ())
            hit = [names[id(p)] for p in captured if id(p) in names]
            if hit:
                raise ModelError(
                    f"parameters {', '.join(hit[:4])}{', ...' if len(hit) > 4 else ''} are part of a CUDA graph "
                    "(torch.cuda.make_graphed_callables), which would go on with the old weights, expected a model without. "
                    "Reduce first and capture afterwards, or build the model anew from its state_dict for the reduction"
                )


def closure_of(function: types.FunctionType) -> dict[str, object]:
    """Names and values of the variables that a function closes over, those that are set."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    values = {}
    for name, cell in cells:
        try:
            values[name] = cell.cell_contents
        except ValueError:  # not set yet
            continue
    return values


def warn_copies(model: nn.Module, replaced: Mapping[str, Tensor], ema: nn.Module | MutableMapping[str, Tensor] | None) -> None:
    """Tell about traced or exported copies, averaged copies that were not passed as ``ema``, and captured CUDA graphs.

    Warns:
        StaleCopyWarning: for each of them.
    """
    names = {id(p): name for name, p in replaced.items()}
    inside = {id(module._parameters) for module in model.modules()}
    shapes = [p.shape for p in model.parameters()]
    for module in _alive(nn.Module):
        if module is ema or id(vars(module).get("_parameters")) in inside:
            continue
        held = [names[id(p)] for _, p in module.named_parameters(recurse=False) if id(p) in names]
        if held:
            _warn(
                f"a {type(module).__name__} outside the model holds {', '.join(held[:4])}{', ...' if len(held) > 4 else ''}: "
                "a traced, exported or tied copy, which keeps the old weights. Make it again after the reduction"
            )
        elif isinstance(module, torch.optim.swa_utils.AveragedModel) and [p.shape for p in module.parameters()] == shapes:
            _warn(
                "an AveragedModel of this model's shapes was not passed as ema=, so that it keeps the old shapes; its next "
                "update fails, or broadcasts silently where one state is left. Pass it as ema=, or build it anew"
            )
    if any(p.is_cuda for p in replaced.values()) and (count := sum(1 for _ in _alive(torch.cuda.CUDAGraph))):
        _warn(
            f"{count} CUDA graphs that were captured before this reduction are alive; replaying one that runs this model goes "
            "on with the old weights. Capture it again (torch.compile does so by itself)"
        )


def _warn(message: str) -> None:
    warnings.warn(message, StaleCopyWarning, stacklevel=6)


def _alive(cls: type) -> Iterator[object]:
    """Every instance of a class that the garbage collector tracks."""
    for item in gc.get_objects():
        if issubclass(type(item), cls):  # isinstance would ask lazy proxies for their class
            yield item
