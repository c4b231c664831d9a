"""What surgery may replace, by reference, so that it can be put back after surgery is over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from typing import Any

from torch import nn

from compressm.adapters.parameters import holder
from compressm.compression.common.models import Layers
from compressm.compression.surgery.audit import Ema, Optimizers, ema_layer, ema_slot, full_name
from compressm.compression.surgery.optimizer_state import master_stores

Undo = Callable[[], None]  # may be called again, and where nothing was done


def take_back(done: list[Undo]) -> None:
    """Call every undo of a list and empty it, the last one first: all, though one raises (an EMA's mapping, say), and all again
    that Ctrl-C may have cut short."""
    failures: list[Exception] = []

    def undo() -> None:
        while done:
            try:
                done[-1]()
            except Exception as error:  # raised below
                failures.append(error)
            done.pop()

    try:
        undo()
    except BaseException:
        undo()
        raise
    if failures:
        raise failures[0]


class References:
    """The parameters of some layers in model, optimizers, master copies and EMA, and the layers' size attributes, as they are.

    Nothing is copied: a reduction puts new objects in the places of old ones, and :meth:`restore` puts the old ones back.

    Args:
        layers: by name, from ``find_layers``.
        optimizers: those that train them.
        ema: the averaged copy, or None.
    """

    def __init__(self, layers: Layers, optimizers: Optimizers, ema: Ema | None) -> None:
        self._undo: list[Undo] = []
        for name, (module, adapter) in layers.items():
            roots = [module] + ([ema_layer(ema, name)] if isinstance(ema, nn.Module) else [])
            for key in adapter.parameters(module):
                owner, leaf = holder(module, key)
                places: list[tuple[MutableMapping[str, Any], str]] = [(owner._parameters, leaf)]
                places += [ema_slot(ema, name, key)] if ema is not None else []
                places += [(store, full_name(name, key)) for store in master_stores(optimizers, full_name(name, key))]
                self._undo += [partial(mapping.__setitem__, place, mapping[place]) for mapping, place in places]
            for key in adapter.optional:
                self._undo += [partial(root._parameters.__setitem__, key, root._parameters.get(key)) for root in roots]
                if isinstance(ema, MutableMapping) and full_name(name, key) not in ema:
                    self._undo.append(partial(drop_item, ema, full_name(name, key)))
            for root in roots:
                for key in adapter.attributes(module, adapter.rank(module)):
                    owner, leaf = holder(root, key)
                    self._undo.append(partial(setattr, owner, leaf, getattr(owner, leaf)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                self._undo.append(partial(put_list, group["params"], list(group["params"])))
            self._undo.append(partial(put_mapping, optimizer.state, dict(optimizer.state)))

    def restore(self) -> None:
        """Put everything back."""
        take_back(list(self._undo))


def drop_item(target: MutableMapping[Any, Any], key: Any) -> None:
    """Make a mapping have nothing under a key."""
    target.pop(key, None)


def put_list(target: list[Any], values: list[Any]) -> None:
    """Make it the content of a list."""
    target[:] = values


def put_mapping(target: MutableMapping[Any, Any], values: Mapping[Any, Any]) -> None:
    """Make it the content of a mapping."""
    target.clear()
    target.update(values)
