"""Optimizer state set apart and put back: by parameter name for checkpoints, checked first; by place for snapshots."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressm.compression.common.memory import ordered_state
from compressm.compression.surgery.optimizer_state import held_parameters, needed_keys, shaped_keys
from compressm.compression.surgery.references import Undo, put_mapping
from compressm.errors import CheckpointError, OptimizerError

LARGEST = torch.finfo(torch.float32).max  # of a hyperparameter
IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")  # how steps are computed, where the model is now
COUNTERS = (torch.float32, torch.float64, torch.int64, torch.int32)  # smaller ones stop counting


def named_groups(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """Names of the parameters in every group of an optimizer.

    Raises:
        OptimizerError: a parameter in a group is not the model's.
    """
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    for index, group in enumerate(optimizer.param_groups):
        foreign = [tuple(p.shape) for p in group["params"] if id(p) not in known]
        if foreign:
            raise OptimizerError(
                f"optimizer: group {index} holds parameters that are not the model's (shapes {foreign[:3]}), expected its own"
            )
    return [[known[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def pack_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """``optimizer.state_dict()`` with parameter names for numbers: {"groups", "state", "more"}.

    Raises:
        OptimizerError: a parameter in a group is not the model's.
        CheckpointError: there is state of something that is no parameter, which would be lost.
    """
    names = _names(optimizer, model)
    packed = optimizer.state_dict()
    state = {}
    for number, entries in packed["state"].items():
        if number not in range(len(names)) or not isinstance(entries, Mapping):
            raise CheckpointError(f"optimizer: state under {number!r} belongs to no parameter of its groups, cannot be stored")
        if entries:
            state[names[number]] = dict(entries)
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in packed["param_groups"]]
    return {"groups": groups, "state": state, "more": {k: v for k, v in packed.items() if k not in ("state", "param_groups")}}


def check_optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, saved: Any, parameters: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What ``optimizer.load_state_dict`` takes, after checking that groups, types and shapes fit.

    Args:
        optimizer, model: as they are before anything is reshaped.  ``foreach``, ``fused``, ``capturable`` and
            ``differentiable`` stay the optimizer's own: a run may go on where the saved ones do not work.
        saved: from :func:`pack_optimizer`.
        parameters: by name, tensors of the shapes that the parameters will have.

    Raises:
        CheckpointError: it does not fit.
    """
    now = named_groups(optimizer, model)
    if not isinstance(saved, Mapping) or saved.keys() != {"groups", "state", "more"}:
        raise CheckpointError("optimizer state is malformed")
    groups, state, more = saved["groups"], saved["state"], saved["more"]
    well_formed = isinstance(groups, list) and all(isinstance(group, Mapping) for group in groups)
    if not well_formed or [group.get("params") for group in groups] != now:
        raise CheckpointError("its optimizer groups hold other parameters, expected those of this optimizer")
    if not isinstance(state, Mapping) or not isinstance(more, Mapping) or {"state", "param_groups"} & more.keys():
        raise CheckpointError("optimizer state is malformed")
    for index, (group, own) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        _check_group(f"optimizer group {index}", group, own)
        _check_ranges(f"optimizer group {index}", group, type(optimizer))
    needed = {name: needed_keys(optimizer, group) for group in groups for name in group["params"]}
    shaped = shaped_keys(optimizer)
    for name, entries in state.items():
        if name not in needed or not isinstance(entries, Mapping):
            raise CheckpointError(f"optimizer state of {name!r:.80}, expected a parameter of this optimizer")
        held = {key for key, value in entries.items() if value is not None or key == "momentum_buffer"}  # SGD's begins as None
        if lost := sorted(needed[name] - held):
            raise CheckpointError(f"optimizer state of {name!r} has no {', '.join(lost)}")
        for key, value in entries.items():
            _check_entry(f"optimizer state {key!s:.80} of {name!r}", key, value, parameters[name], key in shaped)
    return {**more, **numbered(optimizer, model, saved)}


def numbered(optimizer: torch.optim.Optimizer, model: nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
    """State and groups from :func:`pack_optimizer` with numbers for names, every group computing as the optimizer's own."""
    numbers = {name: number for number, name in enumerate(_names(optimizer, model))}
    groups = [
        {**group, **{key: own[key] for key in IMPLEMENTATION if key in own}, "params": [numbers[n] for n in group["params"]]}
        for group, own in zip(saved["groups"], optimizer.param_groups, strict=True)
    ]
    return {"state": {numbers[name]: dict(entries) for name, entries in saved["state"].items()}, "param_groups": groups}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, ready: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]
) -> None:
    """``optimizer.load_state_dict``, but no state is rounded where its parameter has kept its dtype.

    torch casts all state to the dtype of its parameter, in which its own optimizers keep it; others keep float32 moments or
    copies of bfloat16 parameters.  State of a parameter's shape is laid out in memory as the parameter is.

    Args:
        optimizer, model: as they are now.
        ready: from :func:`check_optimizer_state`, or :func:`numbered`.
        dtypes: of the parameters when they were saved, by name.

    Raises:
        CheckpointError: the optimizer refuses the state; it may have taken a part.
    """
    kind = type(optimizer).__name__
    own = [dict(group) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(dict(ready))
    except Exception as error:
        raise CheckpointError(f"its optimizer state does not fit {kind} ({type(error).__name__}: {error})") from error
    for group, before in zip(optimizer.param_groups, own, strict=True):
        if lost := sorted((optimizer.defaults.keys() & before.keys()) - group.keys()):
            raise CheckpointError(f"its optimizer groups have no {', '.join(lost)}, which {kind} needs")
        for key, value in group.items():
            if isinstance(value, Tensor) and isinstance(before.get(key), Tensor):
                group[key] = value.to(before[key])
    names, foreign = _names(optimizer, model), not type(optimizer).__module__.startswith("torch.")
    for number, (name, parameter) in enumerate(zip(names, held_parameters(optimizer), strict=True)):
        if not isinstance(state := optimizer.state.get(parameter), dict):
            continue
        for key, value in ready["state"].get(number, {}).items() if foreign and dtypes.get(name) == parameter.dtype else ():
            loaded = state.get(key)
            if isinstance(value, Tensor) and isinstance(loaded, Tensor) and value.dtype != loaded.dtype:
                state[key] = value.to(loaded.device)
        state.update(ordered_state(state, parameter))


def keep_optimizer(optimizer: torch.optim.Optimizer) -> list[Undo]:
    """What undoes :func:`load_optimizer_state`."""
    state, groups = optimizer.state, optimizer.param_groups
    contents = [*(held for held in state.values() if isinstance(held, dict)), *groups, state]
    undo: list[Undo] = [partial(setattr, optimizer, "state", state), partial(setattr, optimizer, "param_groups", groups)]
    return undo + [partial(put_mapping, held, dict(held)) for held in contents]


def pack_in_place(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """State by position of the parameter in the groups, hyperparameters, and values of parameters that are not the model's."""
    places = {p: i for i, p in enumerate(held_parameters(optimizer))}
    own = set(model.parameters())
    return {
        "state": {places[key] if isinstance(key, Tensor) else key: dict(value) for key, value in optimizer.state.items()},
        "groups": [{**group, "params": len(group["params"])} for group in optimizer.param_groups],
        "foreign": {i: p.data for p, i in places.items() if p not in own},
    }


def fill_in_place(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Put back what :func:`pack_in_place` returned, or copies of it."""
    held = held_parameters(optimizer)
    for index, value in saved["foreign"].items():
        held[index].copy_(value)
        held[index].grad = None
    optimizer.state.clear()
    for key, value in saved["state"].items():
        if isinstance(key, int):
            optimizer.state[held[key]] = ordered_state(value, held[key])
        else:
            optimizer.state[key] = value
    for group, before in zip(optimizer.param_groups, saved["groups"], strict=True):
        for key in group.keys() - before.keys():
            del group[key]
        for key, value in before.items():
            if key != "params":
                _set_hyperparameter(group, key, value)


def _set_hyperparameter(group: dict[str, Any], key: str, value: Any) -> None:
    """A learning rate that is a tensor stays the same tensor, which compiled optimizers and schedulers hold on to."""
    if isinstance(group.get(key), Tensor) and isinstance(value, Tensor) and group[key].shape == value.shape:
        group[key].copy_(value)
    else:
        group[key] = value


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names of an optimizer's parameters in the order of its groups."""
    return [name for group in named_groups(optimizer, model) for name in group]


def _check_group(where: str, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Hyperparameters must be of the kind that the optimizer has; others, such as a scheduler's ``initial_lr``, are kept."""
    for key in saved.keys() & own.keys() - {"params", *IMPLEMENTATION}:
        if not _alike(saved[key], own[key]):
            raise CheckpointError(f"{where}: {key} is {saved[key]!r:.80}, expected one like {own[key]!r:.80}")


def _check_ranges(where: str, group: Mapping[str, Any], kind: type[torch.optim.Optimizer]) -> None:
    """What the constructor of one of torch's optimizers refuses would only fail in a later step, if at all."""
    if not kind.__module__.startswith("torch."):
        return
    accepted = inspect.signature(kind.__init__).parameters.keys() - {"params", *IMPLEMENTATION}
    try:
        kind([nn.Parameter(torch.zeros(1, 1, device="cpu"))], **{key: value for key, value in group.items() if key in accepted})
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{where}: {kind.__name__} does not take its hyperparameters ({error})") from error


def _alike(value: Any, own: Any) -> bool:
    if own is None:
        return value is None or isinstance(value, bool) or _is_number(value)
    if isinstance(own, bool):
        return value is None or isinstance(value, bool)
    if isinstance(own, int | float | Tensor):
        return _is_number(value)
    if isinstance(own, list | tuple):
        fits = isinstance(value, list | tuple) and len(value) == len(own)
        return fits and all(_alike(one, other) for one, other in zip(value, own, strict=True))
    return isinstance(value, type(own))


def _is_number(value: Any) -> bool:
    """Finite in float32, no bool; tensors of one element count."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _check_entry(where: str, key: Any, value: Any, parameter: Tensor, shaped: bool) -> None:
    counts = _is_number(value) and value >= 0 and getattr(value, "dtype", torch.int64) in COUNTERS
    if key == "step" and not counts:
        raise CheckpointError(f"{where} is {value!r:.80}, expected a number of steps")
    if shaped and value is not None:
        unlike = not isinstance(value, Tensor) or value.is_complex() != parameter.is_complex()
        if unlike or (value.is_complex() and value.dtype != parameter.dtype):  # torch casts real state only
            got = str(value.dtype) if isinstance(value, Tensor) else f"{value!r:.80}"
            raise CheckpointError(f"{where} is {got}, expected a tensor like its parameter, {parameter.dtype}")
        if value.shape != parameter.shape:
            raise CheckpointError(f"{where} has shape {tuple(value.shape)}, expected {tuple(parameter.shape)}")
        if not (value.is_floating_point() or value.is_complex()):
            raise CheckpointError(f"{where} is {value.dtype}, expected floating point")
    if isinstance(value, Tensor) and has_nan(value):
        raise CheckpointError(f"{where} holds NaN, expected numbers. Training had diverged: use an earlier checkpoint")


def has_nan(value: Tensor) -> bool:
    """Whether any element is NaN; of complex ones, any part."""
    lowest, _ = extremes(value)
    return math.isnan(lowest)


def extremes(value: Tensor) -> tuple[float, float]:
    """Smallest and largest element; NaN if there is a NaN, 0 without elements or where all are integers."""
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    if not value.is_floating_point() or not value.numel():
        return 0.0, 0.0
    lowest, highest = torch.aminmax(value if value.element_size() > 1 else value.float())
    return lowest.item(), highest.item()
