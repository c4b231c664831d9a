"""What surgery may replace, by reference, so that it can be put back after surgery is over."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from compressm.adapters import Adapter
from compressm.adapters.base import holder
from compressm.compression.audit import Ema, Optimizers, ema_layer, ema_slot


class References:
    """The parameters of some layers in model, optimizers and EMA copy, and the layers' size attributes, as they are now.

    Nothing is copied: a reduction puts new objects in the places of old ones, and :meth:`restore` puts the old ones back.

    Args:
        layers: by name, from ``find_layers``.
        optimizers: those that train them.
        ema: the averaged copy, or None.
    """

    def __init__(self, layers: Mapping[str, tuple[nn.Module, Adapter]], optimizers: Optimizers, ema: Ema | None) -> None:
        self._slots, self._attributes = [], []
        for name, (module, adapter) in layers.items():
            roots = [module] + ([ema_layer(ema, name)] if isinstance(ema, nn.Module) else [])
            for key in adapter.parameters(module):
                owner, leaf = holder(module, key)
                places = [(owner._parameters, leaf)] + ([ema_slot(ema, name, key)] if ema is not None else [])
                self._slots += [(mapping, leaf, mapping[leaf]) for mapping, leaf in places]
            for root in roots:
                for key in adapter.attributes(module, adapter.rank(module)):
                    owner, leaf = holder(root, key)
                    self._attributes.append((owner, leaf, getattr(owner, leaf)))
        self._groups = [(group, list(group["params"])) for optimizer in optimizers for group in optimizer.param_groups]
        self._states = [(optimizer.state, dict(optimizer.state)) for optimizer in optimizers]

    def restore(self) -> None:
        """Put everything back."""
        for mapping, leaf, value in self._slots:
            mapping[leaf] = value
        for owner, leaf, value in self._attributes:
            setattr(owner, leaf, value)
        for group, parameters in self._groups:
            group["params"][:] = parameters
        for state, saved in self._states:
            state.clear()
            state.update(saved)
