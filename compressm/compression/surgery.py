"""The one place that mutates: replaces parameters in model, optimizers and EMA copy together, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters import Adapter, LayerEdit
from compressm.adapters.base import holder, parameter_at
from compressm.compression._workers import each
from compressm.compression.audit import (
    Ema,
    Optimizers,
    audit,
    check_ema,
    check_swappable,
    ema_layer,
    ema_slot,
    trained_names,
)
from compressm.compression.moments import new_states, warn_unknown

Action = tuple[Callable[[], None], Callable[[], None]]  # do, undo; neither can fail


@dataclass(frozen=True)
class Swap:
    """The parameters of one layer that are replaced.

    Attributes:
        name, module: the layer.
        old, new: name relative to the layer, to parameter.
        attributes: plain attributes that change along, by name relative to the layer.
    """

    name: str
    module: nn.Module
    old: dict[str, nn.Parameter]
    new: dict[str, nn.Parameter]
    attributes: Mapping[str, int]

    @classmethod
    def of(cls, name: str, module: nn.Module, tensors: Mapping[str, Tensor], attributes: Mapping[str, int]) -> Swap:
        """Wrap new tensors like the old parameters: requires_grad and attributes such as ``_no_weight_decay`` stay."""
        old = {key: parameter_at(module, key) for key in tensors}
        return cls(name, module, old, {key: _parameter_like(old[key], value) for key, value in tensors.items()}, attributes)

    def actions(self) -> list[Action]:
        """Put the new parameters and attributes into the module."""
        actions = []
        for key, parameter in self.new.items():
            owner, leaf = holder(self.module, key)
            actions.append(_assign(owner._parameters, leaf, parameter))
        return actions + _attribute_actions(self.module, self.attributes)


def apply_edits(
    model: nn.Module,
    edits: Mapping[str, LayerEdit],
    layers: Mapping[str, tuple[nn.Module, Adapter]],
    *,
    optimizers: Optimizers = (),
    ema: Ema | None = None,
    moments: str = "transport",
) -> None:
    """Carry out all edits in model, optimizers and EMA, or none of them.

    New parameters keep ``requires_grad``, dtype, device and attributes; they take the old ones' places in the optimizers'
    groups, whose objects stay the same.  Gradients of replaced parameters are dropped.  Everything is computed before the
    first change, and an audit after the last one undoes all of them if it finds a fault.

    Args:
        model: the plain model.
        edits: by layer name.
        layers: from ``find_layers``.
        optimizers: those that train the model.
        ema: a module of the same structure (``AveragedModel`` or a copy), or a dict of full parameter names to tensors;
            its values follow the same change of basis.
        moments: what happens to optimizer state, see ``moments.new_states``.

    Raises:
        ModelError, OptimizerError, ArgumentError, NumericalError: nothing has changed.
    """
    check_swappable(model, {name: (layers[name][0], edit.tensors) for name, edit in edits.items()})
    swaps = []
    for name, edit in edits.items():
        module, adapter = layers[name]
        swaps.append(Swap.of(name, module, edit.tensors, adapter.attributes(module, edit.rank_after)))
    actions: list[Action] = []
    for optimizer in optimizers:
        carried = each(
            lambda name, swap, optimizer=optimizer: new_states(optimizer, swap.old, edits[name], moments, optimizers),
            {swap.name: swap for swap in swaps},
        )
        if unknown := set().union(*(keys for _, keys in carried.values())):
            warn_unknown(optimizer, unknown)
        actions += _optimizer_actions(optimizer, swaps, {name: states for name, (states, _) in carried.items()})
    if ema is not None:
        check_ema(ema, model, {name: layers[name] for name in edits})
        for part in each(lambda name, edit: _ema_actions(ema, name, edit), edits).values():
            actions += part
        if isinstance(ema, nn.Module):
            for swap in swaps:
                actions += _attribute_actions(ema_layer(ema, swap.name), swap.attributes)
    _commit(model, optimizers, swaps, actions)


def reshape(
    model: nn.Module,
    layers: Mapping[str, tuple[nn.Module, Adapter]],
    ranks: Mapping[str, int],
    optimizers: Optimizers = (),
) -> Callable[[], None]:
    """Give layers blank (zero) parameters of other ranks, in model and optimizers, as before loading a checkpoint.

    Optimizer state of the replaced parameters is dropped.

    Returns:
        a function that puts the old parameters and their state back.
    """
    swaps = []
    for name, rank in ranks.items():
        module, adapter = layers[name]
        if adapter.rank(module) != rank:
            blank = adapter.blank(module, rank)
            check_swappable(model, {name: (module, blank)})
            swaps.append(Swap.of(name, module, blank, adapter.attributes(module, rank)))
    actions = [action for optimizer in optimizers for action in _optimizer_actions(optimizer, swaps, {})]
    undo = _commit(model, optimizers, swaps, actions)
    return undo


def _commit(model: nn.Module, optimizers: Optimizers, swaps: Sequence[Swap], actions: list[Action]) -> Callable[[], None]:
    """Do everything, audit, and undo everything if the audit raises; returns the undo."""
    trained = trained_names(model, optimizers)
    for swap in swaps:
        actions += swap.actions()
    done: list[Callable[[], None]] = []

    def undo() -> None:
        while done:
            done.pop()()

    complete = False
    try:
        for do, reverse in actions:
            do()
            done.append(reverse)
        audit(model, optimizers, trained=trained, dead=[p for swap in swaps for p in swap.old.values()])
        complete = True
    finally:
        if not complete:
            undo()
    return undo


def _optimizer_actions(
    optimizer: torch.optim.Optimizer, swaps: Sequence[Swap], states: Mapping[str, Mapping[str, dict[str, Any]]]
) -> list[Action]:
    """Put new parameters at the places of the old ones, and re-key the state."""
    replaced = {id(p): (swap, key) for swap in swaps for key, p in swap.old.items()}
    actions: list[Action] = []
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            if id(parameter) in replaced:
                swap, key = replaced[id(parameter)]
                actions.append(_assign(group["params"], index, swap.new[key]))
    for swap in swaps:
        for key, parameter in swap.old.items():
            if parameter in optimizer.state:
                state = states.get(swap.name, {}).get(key)
                actions.append(_rekey(optimizer.state, parameter, swap.new[key], state))
    return actions


def _ema_actions(ema: Ema, name: str, edit: LayerEdit) -> list[Action]:
    slots = {key: ema_slot(ema, name, key) for key in edit.tensors}
    values = edit.values({key: slot[leaf].detach().double() for key, (slot, leaf) in slots.items()})
    actions = []
    for key, (slot, leaf) in slots.items():
        old, value = slot[leaf], values[key].to(slot[leaf])
        actions.append(_assign(slot, leaf, _parameter_like(old, value) if isinstance(old, nn.Parameter) else value))
    return actions


def _parameter_like(old: nn.Parameter, value: Tensor) -> nn.Parameter:
    new = nn.Parameter(value.detach().clone().contiguous(), requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    return new


def _assign(container: Any, key: Any, value: Any) -> Action:
    old = container[key]

    def put(item: Any) -> Callable[[], None]:
        return lambda: container.__setitem__(key, item)

    return put(value), put(old)


def _attribute_actions(module: nn.Module, attributes: Mapping[str, int]) -> list[Action]:
    """Set plain attributes of a layer, by name relative to it."""
    actions = []
    for key, value in attributes.items():
        owner, leaf = holder(module, key)
        old = getattr(owner, leaf)
        actions.append((partial(setattr, owner, leaf, value), partial(setattr, owner, leaf, old)))
    return actions


def _rekey(mapping: MutableMapping[Any, Any], old: Tensor, new: Tensor, state: dict[str, Any] | None) -> Action:
    before = mapping[old]

    def do() -> None:
        del mapping[old]
        if state is not None:
            mapping[new] = state

    def undo() -> None:
        mapping.pop(new, None)
        mapping[old] = before

    return do, undo
