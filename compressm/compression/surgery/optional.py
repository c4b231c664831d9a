"""Parameters that a layer may lack: given to it in front of a reduction that needs them, taken away where it is undone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from compressm.adapters import Adapter
from compressm.adapters.parameters import own_parameter
from compressm.compression.common.models import Layers
from compressm.compression.surgery.audit import Ema, Optimizers, ema_layer, full_name
from compressm.compression.surgery.edits import attribute_actions


def present(module: nn.Module, adapter: Adapter) -> tuple[str, ...]:
    """Those of the adapter's optional parameters that a layer has."""
    return tuple(key for key in adapter.optional if module._parameters.get(key) is not None)


def named(layers: Layers, names: Collection[str], prefix: str = "") -> dict[str, tuple[str, ...]]:
    """By layer, its optional parameters that are among ``names``, those of a state_dict say."""
    return {
        layer: tuple(key for key in adapter.optional if prefix + full_name(layer, key) in names)
        for layer, (_, adapter) in layers.items()
    }


def wanted(layers: Layers, names: Collection[str], prefix: str = "") -> dict[str, tuple[str, ...]]:
    """:func:`named`, of those layers that ``names`` mentions and that would not fit them as they are."""
    result = {}
    for name, keys in named(layers, names, prefix).items():
        module, adapter = layers[name]
        if not adapter.optional or prefix + full_name(name, adapter.neighbour(module)) not in names:
            continue
        idle = adapter.identities(module)
        has = present(module, adapter)
        if set(keys) - set(has) or any(own_parameter(module, key).shape != idle[key].shape for key in set(has) - set(keys)):
            result[name] = keys
    return result


@torch.no_grad()
def give(layers: Layers, wanted: dict[str, tuple[str, ...]], optimizers: Optimizers = (), ema: Ema | None = None) -> None:
    """Give layers those optional parameters that are wanted, and no others, in model, optimizers and averaged copy.

    New ones change no output.  They stand behind their neighbour (``Adapter.neighbour``) in its group, are trained if it is,
    and have no optimizer state.  Undo it by ``References``.

    Args:
        layers: by name.
        wanted: by layer, names relative to it.
        optimizers: those that train the layers.
        ema: the averaged copy, whose own become the same.

    Raises:
        ArgumentError: a layer cannot have them; those before it have changed.
    """
    for name, keys in wanted.items():
        module, adapter = layers[name]
        has = present(module, adapter)
        if missing := [key for key in keys if key not in has]:
            able = adapter.in_form(module, None if has else adapter.forms[-1])
            _add(name, module, able, missing, optimizers, ema)
        for key in set(has) - set(keys):
            _remove(name, module, key, optimizers, ema)


def unlike(layers: Layers, names: Collection[str], prefix: str = "") -> dict[str, dict[str, Any]]:
    """By layer, what ``Adapter.as_stored`` says of a state_dict's names; of those alone that have to change."""
    found = {}
    for layer, (module, adapter) in layers.items():
        start = prefix + full_name(layer, "")
        own = {name.removeprefix(start) for name in names if name.startswith(start)}
        if own.intersection(adapter.parameters(module)) and (attributes := adapter.as_stored(module, own)):
            found[layer] = attributes
    return found


def make_alike(layers: Layers, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Set what :func:`unlike` says.  Undo it by ``References``."""
    for layer, values in attributes.items():
        for change in attribute_actions(layers[layer][0], values):
            change()


def _add(name: str, module: nn.Module, adapter: Adapter, keys: Iterable[str], optimizers: Optimizers, ema: Ema | None) -> None:
    beside, values = own_parameter(module, adapter.neighbour(module)), adapter.identities(module)
    behind = beside
    for key in keys:
        parameter = nn.Parameter(values[key], beside.requires_grad)
        vars(parameter).update(vars(beside))
        module.register_parameter(key, parameter)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            place = next((i for i, held in enumerate(group["params"]) if held is behind), None)
            if place is not None:
                group["params"].insert(place + 1, parameter)
        behind = parameter
        if isinstance(ema, nn.Module):
            averaged = ema_layer(ema, name)
            trained = own_parameter(averaged, adapter.neighbour(module)).requires_grad
            averaged.register_parameter(key, nn.Parameter(values[key].clone(), trained))
        elif ema is not None:
            ema[full_name(name, key)] = values[key].clone()


def _remove(name: str, module: nn.Module, key: str, optimizers: Optimizers, ema: Ema | None) -> None:
    parameter = own_parameter(module, key)
    module._parameters[key] = None
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"][:] = [held for held in group["params"] if held is not parameter]
        optimizer.state.pop(parameter, None)
    if isinstance(ema, nn.Module):
        ema_layer(ema, name)._parameters[key] = None
    elif ema is not None:
        ema.pop(full_name(name, key), None)
