"""A full-size model that takes the weights of a reduced one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compressm.adapters import Adapter, find_layers
from compressm.compression.common.models import compressible_layers, plain_model
from compressm.compression.surgery.audit import as_optimizers, check_optimizers, full_name
from compressm.compression.surgery.edits import reshape
from compressm.compression.surgery.optional import give, make_alike, present, unlike, wanted
from compressm.compression.surgery.references import References
from compressm.errors import bad_argument
from compressm.integrations._common import tell_configs

Optimizers = Sequence[torch.optim.Optimizer]
Layers = Mapping[str, tuple[nn.Module, Adapter]]


def resize_to(
    model: nn.Module, state_dict: Mapping[str, Any], *, optimizer: torch.optim.Optimizer | Optimizers | None = None
) -> nn.Module:
    """Give the state-space layers of a model the numbers of states that a ``state_dict`` has, so that it can be loaded.

    For weights of a reduced model that :func:`compressm.save` did not write (it needs no such call).  The layers that change
    are zero until the weights are loaded; ``strict`` and ``assign`` are yours to choose::

        state = torch.load("reduced.pt")
        compressm.resize_to(model, state, optimizer=optimizer).load_state_dict(state)

    Layers that ``state_dict`` does not mention stay as they are.  ``config.state_size`` of transformers' models follows.

    Args:
        model: plain, or behind ``torch.compile``'s wrapper; the names in ``state_dict`` are its own.
        state_dict: parameter name to tensor.
        optimizer: the one that holds the model's parameters, or several: replaced parameters are exchanged in its groups, and
            their state is dropped (``optimizer.load_state_dict`` takes that of the reduced run then).  None: build it later.

    Returns:
        the model.

    Raises:
        ArgumentError: no layer of the model is in ``state_dict``, or one is only in part or has shapes that fit no number of
            states; nothing has changed.
        ModelError, OptimizerError: nothing to resize, a wrapped model, or an optimizer of another; nothing has changed.
    """
    if not isinstance(state_dict, Mapping):
        raise bad_argument("state_dict", got=type(state_dict).__name__, expected="a mapping of names to tensors")
    plain_model(model)
    layers, optimizers = compressible_layers(model), as_optimizers(optimizer)
    found = {name: layer for name, layer in layers.items() if _present(state_dict, name, *layer)}
    if not found:
        name, (module, adapter) = next(iter(layers.items()))
        expected = f"parameters of the model's state-space layers, such as {full_name(name, adapter.parameters(module)[0])!r}"
        got = f"names such as {', '.join(map(repr, list(state_dict)[:3]))}" if state_dict else "an empty one"
        remedy = "Strip prefixes that wrappers have added, and pass the weights alone of a checkpoint that holds more"
        raise bad_argument("state_dict", got=got, expected=expected, remedy=remedy)
    for name, layer in found.items():
        _check_whole(state_dict, name, *layer)
    if optimizers:
        check_optimizers(found, model, optimizers)
    take_ranks(model, found, state_dict, optimizers=optimizers)
    tell_configs(model)
    return model


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
        if take_ranks(module, find_layers(module), state, prefix, optimizers()) and after is not None:
            after()

    return model.register_load_state_dict_pre_hook(hook)


def take_ranks(
    model: nn.Module, layers: Layers, state: Mapping[str, Any], prefix: str = "", optimizers: Optimizers = ()
) -> bool:
    """Resize those of a model's layers whose tensors in ``state`` fit another number of states.

    Returns:
        whether there were any.
    """
    before = References(layers, optimizers, None)
    give(layers, wanted(layers, state, prefix), optimizers)
    make_alike(layers, unlike(layers, state, prefix))
    ranks = {name: _rank_in(state, prefix + name, *layer) for name, layer in layers.items()}
    if any(rank is None and _present(state, prefix + name, *layers[name]) for name, rank in ranks.items()):
        before.restore()
    changed = {name: rank for name, rank in ranks.items() if rank is not None and rank != layers[name][1].rank(layers[name][0])}
    if changed:
        reshape(model, layers, changed, optimizers)
    return bool(changed)


def follow(model: nn.Module, copy: nn.Module) -> None:
    """Give a copy of a model, or an ``AveragedModel`` of it, the model's numbers of states; what changes is zero."""
    copy = copy.module if isinstance(copy, torch.optim.swa_utils.AveragedModel) else copy
    copied, layers = find_layers(copy, strict=False), find_layers(model)
    give(copied, {name: present(*layers[name]) for name in copied if name in layers})
    make_alike(copied, unlike(copied, model.state_dict()))
    ranks = {name: adapter.rank(module) for name, (module, adapter) in layers.items() if name in copied}
    reshape(copy, copied, ranks)


def _present(state: Mapping[str, Any], name: str, module: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """Those of a layer's tensors that depend on its rank and are in ``state``, by name relative to the layer."""
    start = f"{name.removesuffix('.')}." if name else ""
    keys = {key: state.get(start + key) for key in adapter.parameters(module)}
    return {key: tensor for key, tensor in keys.items() if isinstance(tensor, Tensor)}


def _check_whole(state: Mapping[str, Any], name: str, module: nn.Module, adapter: Adapter) -> None:
    """Raise ArgumentError unless ``state`` has a whole layer, of some number of states."""
    present = _present(state, name, module, adapter)
    if missing := [full_name(name, key) for key in adapter.parameters(module) if key not in present]:
        expected = f"all of layer {name!r}, also {', '.join(missing)}"
        raise bad_argument("state_dict", got=f"only {', '.join(full_name(name, key) for key in present)}", expected=expected)
    if _rank_in(state, name, module, adapter) is None:
        got = ", ".join(f"{full_name(name, key)} of shape {tuple(tensor.shape)}" for key, tensor in present.items())
        now = ", ".join(str(tuple(tensor.shape)) for tensor in adapter.blank(module, adapter.rank(module)).values())
        expected = f"shapes that the layer has at some number of states (now {adapter.rank(module)}: {now})"
        remedy = "Build the model with the channels of the reduced one; only the number of states may differ"
        raise bad_argument("state_dict", got=got, expected=expected, remedy=remedy)


def _rank_in(state: Mapping[str, Any], name: str, module: nn.Module, adapter: Adapter) -> int | None:
    """The rank at which a layer's tensors have the shapes that they have in ``state``; None if there is none.

    The number of entries of every such tensor is linear in the rank.
    """
    present = _present(state, name, module, adapter)
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
