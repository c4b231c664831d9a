"""The one place that mutates: replaces parameters in model, optimizers and EMA copy together, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from compressm.adapters import Adapter, LayerEdit
from compressm.adapters.parameters import holder, own_parameter, wide
from compressm.compression.common.memory import placed_like
from compressm.compression.common.models import Layers
from compressm.compression.common.undisturbed import ordinary
from compressm.compression.common.workers import each
from compressm.compression.surgery.audit import (
    Ema,
    Optimizers,
    audit,
    audit_ema,
    check_ema,
    check_optimizers,
    check_swappable,
    ema_layer,
    ema_slot,
    full_name,
    signature,
    trained_names,
)
from compressm.compression.surgery.moments import new_states, warn_unknown
from compressm.compression.surgery.optimizer_state import MASTER, master_stores, masters_of, state_kinds
from compressm.compression.surgery.references import References
from compressm.compression.surgery.stale import check_copies

Action = Callable[[], Any]  # changes one thing
Leaf = TypeVar("Leaf", bound=Tensor)


@dataclass(frozen=True)
class Swap:
    """The parameters of one layer that are replaced.

    Attributes:
        name, module: the layer.
        old, new: name relative to the layer, to parameter.
        attributes: plain attributes and buffers that change along, by name relative to the layer.
        old_masters, new_masters: what optimizers hold instead of some of the parameters.
    """

    name: str
    module: nn.Module
    old: dict[str, nn.Parameter]
    new: dict[str, nn.Parameter]
    attributes: Mapping[str, Any]
    old_masters: Mapping[str, Tensor]
    new_masters: Mapping[str, Tensor]

    @classmethod
    def of(
        cls,
        name: str,
        module: nn.Module,
        tensors: Mapping[str, Tensor],
        attributes: Mapping[str, Any],
        masters: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> Swap:
        """Wrap new tensors like the old parameters: requires_grad and attributes such as ``_no_weight_decay`` stay.

        ``masters`` maps some of the names to their old master copies and the new values of these.
        """
        old = {key: own_parameter(module, key) for key in tensors}
        new = {key: _like(old[key], value) for key, value in tensors.items()}
        before = {key: master for key, (master, _) in (masters or {}).items()}
        after = {key: _like(master, value) for key, (master, value) in (masters or {}).items()}
        return cls(name, module, old, new, attributes, before, after)

    @property
    def held(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Name to what optimizers hold of it before and after, if they do."""
        old, new = {**self.old, **self.old_masters}, {**self.new, **self.new_masters}
        return {key: (old[key], new[key]) for key in old}

    def actions(self) -> list[Action]:
        """Put the new parameters and attributes into the module."""
        actions: list[Action] = []
        for key, parameter in self.new.items():
            owner, leaf = holder(self.module, key)
            actions.append(partial(owner._parameters.__setitem__, leaf, parameter))
        return actions + attribute_actions(self.module, self.attributes)


def apply_edits(
    model: nn.Module,
    edits: Mapping[str, LayerEdit],
    layers: Layers,
    *,
    optimizers: Optimizers = (),
    ema: Ema | None = None,
    moments: str = "transport",
) -> None:
    """Carry out all edits in model, optimizers and EMA, or none of them.

    New parameters keep ``requires_grad``, dtype, device and attributes; they take the old ones' places in the optimizers'
    groups, whose objects stay the same.  Gradients of replaced parameters are dropped.  Everything is computed before the
    first change, and an audit after the last one undoes all of them if it finds a fault.  A parameter whose optimizer keeps
    it in higher precision (in its state, or see ``attach_masters``) becomes the rounding of the copy, which is carried in its
    own precision.

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

    Warns:
        UnknownStateWarning: optimizer state was reset.
        StaleCopyWarning: something outside the model goes on with the old weights.
    """
    changed = {name: layers[name] for name in edits}
    check_swappable(model, {name: (layers[name][0], edit.tensors) for name, edit in edits.items()})
    if optimizers:
        check_optimizers(changed, model, optimizers)
    swaps = [_swap(name, *layers[name], edit, optimizers) for name, edit in edits.items()]
    actions: list[Action] = []
    for optimizer in optimizers:
        carried = each(partial(_carried, optimizer, edits, moments, optimizers), {swap.name: swap for swap in swaps})
        if unknown := set().union(*(keys for _, keys in carried.values())):
            warn_unknown(optimizer, unknown)
        actions += _optimizer_actions(optimizer, swaps, {name: states for name, (states, _) in carried.items()})
    actions += _master_actions(optimizers, swaps)
    if ema is not None:
        check_ema(ema, model, changed)
        for part in each(lambda name, edit: _ema_actions(ema, name, edit), edits).values():
            actions += part
        if isinstance(ema, nn.Module):
            for swap in swaps:
                actions += attribute_actions(ema_layer(ema, swap.name), swap.attributes)
    check_copies(model, _pairs(swaps), ema, optimizers)
    _commit(model, optimizers, swaps, actions, changed, ema)


def _carried(
    optimizer: torch.optim.Optimizer,
    edits: Mapping[str, LayerEdit],
    moments: str,
    optimizers: Optimizers,
    name: str,
    swap: Swap,
) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """One layer's new state, see :func:`new_states`."""
    old = {key: held for key, (held, _) in swap.held.items()}
    return new_states(optimizer, old, edits[name], moments, optimizers)


def _swap(name: str, module: nn.Module, adapter: Adapter, edit: LayerEdit, optimizers: Optimizers) -> Swap:
    """A layer's swap; parameters with a copy in higher precision are the rounding of that copy."""
    attached = masters_of(optimizers)
    masters = {key: attached[full_name(name, key)] for key in edit.tensors if full_name(name, key) in attached}
    precise = dict(masters)
    for optimizer in optimizers:
        for slot in (slot for slot, kind in state_kinds(optimizer).items() if kind == MASTER):
            for key in edit.tensors:
                parameter = own_parameter(module, key)
                copy = optimizer.state.get(parameter, {}).get(slot)
                if isinstance(copy, Tensor) and copy.shape == parameter.shape:
                    precise[key] = copy
    tensors, renewed = dict(edit.tensors), dict[str, tuple[Tensor, Tensor]]()
    if precise:
        live: dict[str, Tensor] = {key: own_parameter(module, key) for key in tensors}
        values = edit.values({key: wide(value) for key, value in (live | precise).items()})
        tensors |= {key: values[key].to(master).to(tensors[key]) for key, master in precise.items()}
        renewed = {key: (master, values[key].to(master)) for key, master in masters.items()}
    attributes = {**adapter.attributes(module, edit.rank_after), **edit.attributes}
    return Swap.of(name, module, tensors, attributes, renewed)


@ordinary()
def reshape(
    model: nn.Module,
    layers: Layers,
    ranks: Mapping[str, int],
    optimizers: Optimizers = (),
    *,
    ema: Ema | None = None,
) -> None:
    """Give layers blank (zero) parameters of other ranks, in model and optimizers, as before loading a checkpoint.

    Optimizer state of the replaced parameters is dropped.

    Args:
        ema: an averaged copy that the caller sees to.

    Raises:
        ModelError, OptimizerError: nothing has changed.

    Warns:
        StaleCopyWarning: something goes on with the old weights.
    """
    swaps = []
    for name, rank in ranks.items():
        module, adapter = layers[name]
        if adapter.rank(module) != rank:
            blank = adapter.blank(module, rank)
            check_swappable(model, {name: (module, blank)})
            masters = {key: m for key in blank if (m := masters_of(optimizers).get(full_name(name, key))) is not None}
            empty = {key: (master, blank[key].to(master)) for key, master in masters.items()}
            swaps.append(Swap.of(name, module, blank, adapter.attributes(module, rank), empty))
    actions = [action for optimizer in optimizers for action in _optimizer_actions(optimizer, swaps, {})]
    if swaps:
        check_copies(model, _pairs(swaps), ema, optimizers)
    actions += _master_actions(optimizers, swaps)
    _commit(model, optimizers, swaps, actions, {swap.name: layers[swap.name] for swap in swaps})


def _commit(
    model: nn.Module,
    optimizers: Optimizers,
    swaps: Sequence[Swap],
    actions: list[Action],
    layers: Layers,
    ema: Ema | None = None,
) -> None:
    """Do everything to layers, audit, and put everything back if the audit raises."""
    references = References(layers, optimizers, ema)
    trained, before = trained_names(model, optimizers), signature(model, optimizers)
    dead = [tensor for swap in swaps for tensor in (*swap.old.values(), *swap.old_masters.values())]
    for swap in swaps:
        actions += swap.actions()
    try:
        for do in actions:
            do()
        audit(model, optimizers, trained=trained, dead=dead, before=before)
        if ema is not None:
            audit_ema(ema, model, layers, dead)
    except BaseException:
        references.restore()
        raise


def _pairs(swaps: Sequence[Swap]) -> dict[str, tuple[Tensor, Tensor]]:
    """Full name to old and new parameter."""
    return {full_name(swap.name, key): (old, swap.new[key]) for swap in swaps for key, old in swap.old.items()}


def _optimizer_actions(
    optimizer: torch.optim.Optimizer, swaps: Sequence[Swap], states: Mapping[str, Mapping[str, dict[str, Any]]]
) -> list[Action]:
    """Put new parameters (or master copies) at the places of the old ones, and re-key the state."""
    replaced = {id(old): new for swap in swaps for old, new in swap.held.values()}
    actions: list[Action] = []
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            if id(parameter) in replaced:
                actions.append(partial(group["params"].__setitem__, index, replaced[id(parameter)]))
    for swap in swaps:
        for key, (old, new) in swap.held.items():
            if old in optimizer.state:
                if (state := states.get(swap.name, {}).get(key)) is not None:
                    actions.append(partial(optimizer.state.__setitem__, new, _placed(state, optimizer.state[old])))
                actions.append(partial(optimizer.state.__delitem__, old))
    return actions


def _master_actions(optimizers: Optimizers, swaps: Sequence[Swap]) -> list[Action]:
    """Put new master copies into the mappings that the user reads them from."""
    return [
        partial(store.__setitem__, full_name(swap.name, key), new)
        for swap in swaps
        for key, new in swap.new_masters.items()
        for store in master_stores(optimizers, full_name(swap.name, key))
    ]


def _ema_actions(ema: Ema, name: str, edit: LayerEdit) -> list[Action]:
    slots = {key: ema_slot(ema, name, key) for key in edit.tensors}
    devices = {key: tensor.device for key, tensor in edit.tensors.items()}  # the copy may be kept on another
    values = edit.values({key: wide(slot[leaf].to(devices[key])) for key, (slot, leaf) in slots.items()})
    actions: list[Action] = []
    for key, (slot, leaf) in slots.items():
        old, value = slot[leaf], values[key].to(slot[leaf])
        new = _like(old, value) if isinstance(old, nn.Parameter) else placed_like(value, old)
        actions.append(partial(slot.__setitem__, leaf, new))
    return actions


def _like(old: Leaf, value: Tensor) -> Leaf:
    """A leaf of that value: a Parameter if the old one is, with its requires_grad and attributes, in memory like its."""
    value = placed_like(value.detach().clone(), old)
    wanted = old.requires_grad
    new: Any = nn.Parameter(value, wanted) if isinstance(old, nn.Parameter) else value.requires_grad_(wanted)
    new.__dict__.update(old.__dict__)
    return new


def _placed(state: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """New optimizer state in memory like that of the old."""
    moved = {key: was for key, was in before.items() if isinstance(was, Tensor) and isinstance(state.get(key), Tensor)}
    return state | {key: placed_like(state[key], was) for key, was in moved.items() if state[key] is not was}


def attribute_actions(module: nn.Module, attributes: Mapping[str, Any]) -> list[Action]:
    """Set plain attributes and buffers of a layer, by name relative to it."""
    actions: list[Action] = []
    for key, value in attributes.items():
        owner, leaf = holder(module, key)
        if isinstance(value, Tensor):
            before = getattr(owner, leaf)
            value = value.to(before.device, torch.promote_types(before.dtype, value.dtype), copy=True)
        actions.append(partial(setattr, owner, leaf, value))
    return actions
