"""What all frameworks need to resume: a full-size model that takes the checkpoint of a reduced one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compressm.adapters import Adapter, find_layers
from compressm.compression.surgery import reshape

Optimizers = Sequence[torch.optim.Optimizer]


def resize_on_load(
    model: nn.Module, optimizers: Callable[[], Optimizers] = tuple, *, after: Callable[[], None] | None = None
) -> RemovableHandle:
    """Let ``model.load_state_dict`` take weights of other ranks: its state-space layers are resized to them first.

    Works wherever a framework loads weights through the module, sharded files included.

    Args:
        model: the module whose ``load_state_dict`` is called.
        optimizers: returns those that hold the model's parameters at the time of loading; replaced parameters are exchanged
            in their groups, and their state is dropped.
        after: called when layers were resized.

    Returns:
        a handle whose ``remove()`` ends it.
    """

    def hook(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        layers = find_layers(module)
        ranks = {name: _rank_in(state, f"{prefix}{name}." if name else prefix, *layer) for name, layer in layers.items()}
        changed = {name: rank for name, rank in ranks.items() if rank not in (None, layers[name][1].rank(layers[name][0]))}
        if changed:
            reshape(module, layers, changed, optimizers())
            if after is not None:
                after()

    return model.register_load_state_dict_pre_hook(hook)


def _rank_in(state: Mapping[str, Any], prefix: str, module: nn.Module, adapter: Adapter) -> int | None:
    """The rank at which a layer's tensors have the shapes that they have in ``state``; None if there is none.

    The number of entries of every such tensor is linear in the rank.
    """
    present = {key: state[prefix + key] for key in adapter.parameters(module) if isinstance(state.get(prefix + key), Tensor)}
    if not present:
        return None
    one, two = adapter.blank(module, 1), adapter.blank(module, 2)
    key = next(iter(present))
    slope = two[key].numel() - one[key].numel()
    rank, rest = divmod(present[key].numel() - one[key].numel(), slope)
    if rest or rank < 0:
        return None
    shapes = adapter.blank(module, rank + 1)
    fits = all(shapes[key].shape == tensor.shape for key, tensor in present.items())
    return rank + 1 if fits else None
