"""Everything a training run consists of, put aside before a reduction and put back bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters.parameters import holder, own_parameter
from compressm.compression.common import random_states
from compressm.compression.common.codec import join, split
from compressm.compression.common.memory import placed_like
from compressm.compression.common.models import Layers
from compressm.compression.guard.shelf import Shelf
from compressm.compression.surgery.audit import Ema, Optimizers, ema_layer, full_name
from compressm.compression.surgery.edits import reshape
from compressm.compression.surgery.optional import give, named
from compressm.compression.surgery.packed_optimizer import fill_in_place, pack_in_place
from compressm.errors import ArgumentError, CheckpointError, bad_argument

Getter = Callable[[str], Tensor]
SECTIONS = ("ranks", "model", "optimizers", "ema", "registered", "random", "progress")


@dataclass(frozen=True)
class Parts:
    """What a snapshot holds.

    Attributes:
        model: the plain model.
        layers: from ``find_layers``.
        optimizers: those that train it.
        ema: its averaged copy, or None.
        registered: the caller's objects by name, see :func:`check_registrable`.
    """

    model: nn.Module
    layers: Layers
    optimizers: Optimizers = ()
    ema: Ema | None = None
    registered: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """States per layer."""
        return {name: adapter.rank(module) for name, (module, adapter) in self.layers.items()}

    @property
    def devices(self) -> list[torch.device]:
        """Where the model's parameters are."""
        return list(dict.fromkeys(p.device for p in self.model.parameters()))


class Snapshot:
    """Parameters, buffers, optimizer state, EMA, registered objects, random states and the Compressor's progress.

    Args:
        tree: the sections; tensors may be anywhere in it and are copied to CPU memory or disk.
        disk_bytes: tensors go to temporary files if they are larger than this together.
        folder: of these files; None: the system's.
        homes: device of the tensors that do not belong on the CPU, by name; None: where they are.
    """

    def __init__(
        self, tree: Mapping[str, Any], disk_bytes: int, folder: str | Path | None, homes: Mapping[str, str] | None = None
    ) -> None:
        live: dict[str, Tensor] = {}
        self._tree = {name: split(tree[name], name, live) for name in SECTIONS}
        self.homes = {name: str(t.device) for name, t in live.items() if t.device.type != "cpu"} if homes is None else homes
        self._shapes = {name: tensor.shape for name, tensor in live.items()}
        self.nbytes = sum(tensor.nbytes for tensor in live.values())
        self.on_disk = self.nbytes > disk_bytes
        self._tensors: Mapping[str, Tensor]
        if self.on_disk:
            self._tensors = Shelf(live, folder)
        else:
            self._tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in live.items()}

    @classmethod
    def take(cls, parts: Parts, progress: Any, disk_bytes: int, folder: str | Path | None) -> Snapshot:
        """Put everything aside."""
        tree = {
            "ranks": parts.ranks,
            "model": _module_state(parts.model),
            "optimizers": [pack_in_place(optimizer, parts.model) for optimizer in parts.optimizers],
            "ema": _module_state(parts.ema) if isinstance(parts.ema, nn.Module) else parts.ema,
            "registered": {name: _registered_state(item) for name, item in parts.registered.items()},
            "random": random_states.capture(parts.model),
            "progress": progress,
        }
        return cls(tree, disk_bytes, folder)

    @property
    def ranks(self) -> dict[str, int]:
        """States per layer, then."""
        return self._tree["ranks"]

    @property
    def progress(self) -> Any:
        """What the snapshot was taken with."""
        return join(self._tree["progress"], self._tensors.__getitem__)

    def state_dict(self) -> dict[str, Any]:
        """A tree for :meth:`from_state_dict`; its tensors are the snapshot's own."""
        return self._state(self._tensors.__getitem__)

    def _state(self, get: Getter) -> dict[str, Any]:
        return {**{name: join(self._tree[name], get) for name in SECTIONS}, "homes": dict(self.homes)}

    @classmethod
    def from_state_dict(cls, state: Any, parts: Parts, disk_bytes: int, folder: str | Path | None) -> Snapshot:
        """The snapshot that :meth:`state_dict` was called on.

        Raises:
            ArgumentError: malformed, or of another model, optimizer or set of registered objects.
        """
        check(state, parts)
        return cls(state, disk_bytes, folder, state["homes"])

    def restore(self, parts: Parts) -> dict[str, Exception]:
        """Put everything back; gradients are dropped.  May be done again, also after an interruption.

        The model's layers get parameters of their old size, new objects that take the others' places in the optimizers'
        groups.  Modules, optimizers, their groups, buffers and registered objects stay the same objects.  What does not take
        its state back, a registered object whose ``load_state_dict`` raises, keeps nothing else from it.

        Returns:
            the errors, by what they are about.

        Raises:
            ArgumentError: model, optimizers or registered objects are others than they were; nothing has changed.
            ModelError: a new weight is part of a CUDA graph; nothing has changed.
        """
        _check_layout(self._state(lambda name: torch.empty(self._shapes[name], device="meta")), parts)
        give(parts.layers, named(parts.layers, self._tree["model"]["parameters"]), parts.optimizers, parts.ema)
        reshape(parts.model, parts.layers, self.ranks, parts.optimizers, ema=parts.ema)
        failed: dict[str, Exception] = {}
        with torch.no_grad():
            for parameter in parts.model.parameters():
                parameter.grad = None
            for what, fill in self._pieces(parts):
                try:
                    fill()
                except Exception as error:  # the caller's code may be behind each of them
                    failed[what] = error
        return failed

    def _pieces(self, parts: Parts) -> Iterator[tuple[str, Callable[[], None]]]:
        """What is put back one after the other, in words, and how."""
        devices, get = parts.devices, self._tensors.__getitem__

        def saved(section: str, key: Any = None, get: Getter = get) -> Any:
            return join(self._tree[section] if key is None else self._tree[section][key], get)

        def put(fill: Callable[..., None], item: Any, place: tuple[Any, ...], *more: Any) -> Callable[[], None]:
            return lambda: fill(item, saved(*place), *more)

        for what, module in (("model", parts.model), ("ema", parts.ema)):
            if isinstance(module, nn.Module):
                yield what, put(_fill_module, module, (what,))
                yield f"extra state of the {what}", put(_fill_extra, module, (what, "extra"))
        if isinstance(parts.ema, nn.Module):
            yield "attributes of the ema", lambda: self._set_attributes(parts)
        elif parts.ema is not None:
            yield "ema", put(_fill_mapping, parts.ema, ("ema",))
        for index, optimizer in enumerate(parts.optimizers):
            place = "optimizers", index, self._fresh(devices)
            yield f"optimizer {index}", put(fill_in_place, optimizer, place)
        for name, item in parts.registered.items():
            yield f"registered object {name!r}", put(_fill_registered, item, ("registered", name, self._fresh(devices)))
        yield "random states", lambda: random_states.restore(random_states.adopted(saved("random"), parts.model), parts.model)

    def _set_attributes(self, parts: Parts) -> None:
        """Sizes that the averaged copy's layers say; its buffers are in place."""
        for name, (module, adapter) in parts.layers.items():
            copied = ema_layer(parts.ema, name)
            for key, value in adapter.attributes(module, self.ranks[name]).items():
                owner, leaf = holder(copied, key)
                if not isinstance(value, Tensor):
                    setattr(owner, leaf, value)

    def _fresh(self, devices: list[torch.device]) -> Getter:
        """Looks up a copy of a tensor where it belongs; on a machine without its device, where the model is."""

        def get(name: str) -> Tensor:
            home = torch.device(self.homes.get(name, "cpu"))
            if home.type != "cpu" and home not in devices:
                home = devices[0]
            return self._tensors[name].to(home, copy=True)

        return get

    def close(self) -> None:
        """Let go of the tensors, and of their files."""
        if isinstance(self._tensors, Shelf):
            self._tensors.close()
        self._tensors = {}


def check_registrable(name: str, item: Any) -> None:
    """Raise ArgumentError unless a snapshot can hold the object.

    It can if the object has ``state_dict`` and ``load_state_dict``, is a ``torch.Generator``, or is a dict.
    """
    both = callable(getattr(item, "state_dict", None)) and callable(getattr(item, "load_state_dict", None))
    if not both and not isinstance(item, torch.Generator | dict):
        expected = "an object with state_dict and load_state_dict, a torch.Generator or a dict"
        raise bad_argument(name, got=type(item).__name__, expected=expected)


def check(state: Any, parts: Parts) -> None:
    """Raise ArgumentError unless a snapshot's state fits model, optimizers, EMA and registered objects."""
    _check_layout(state, parts)
    try:
        random_states.check(random_states.adopted(state["random"], parts.model), parts.model)
    except (CheckpointError, TypeError, ValueError, RuntimeError) as error:
        raise bad_argument("snapshot", got=str(error), expected="a Compressor's state") from error


def _check_layout(state: Any, parts: Parts) -> None:
    """All but the values of tensors."""
    try:
        _check_names(state, parts)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise bad_argument("snapshot", got=f"{type(error).__name__}: {error}", expected="a Compressor's state") from error


def _check_names(state: Any, parts: Parts) -> None:
    for tree, keys in ((state, (*SECTIONS, "homes")), (state["model"], ("parameters", "buffers", "extra"))):
        if missing := set(keys) - tree.keys():
            raise bad_argument("snapshot", got=f"nothing under {sorted(missing)}", expected="a Compressor's state")
    ranks = state["ranks"]
    if set(ranks) != set(parts.layers) or not all(type(rank) is int and 1 <= rank <= 1 << 20 for rank in ranks.values()):
        raise bad_argument("snapshot", got=f"ranks {ranks}", expected=f"those of layers {sorted(parts.layers)}")
    shapes = {name: tuple(p.shape) for name, p in parts.model.named_parameters()}
    for name, (module, adapter) in parts.layers.items():
        if adapter.rank(module) != ranks[name]:
            blanks = adapter.blank(module, ranks[name])
            shapes |= {full_name(name, key): tuple(blank.shape) for key, blank in blanks.items()}
    saved = {name: tuple(tensor.shape) for name, tensor in state["model"]["parameters"].items()}
    optional = {full_name(name, key) for name, (_, adapter) in parts.layers.items() for key in adapter.optional}
    if any(saved.get(name) != shapes.get(name) for name in (saved.keys() | shapes.keys()) - optional):
        wrong = sorted(name for name in saved.keys() | shapes.keys() if saved.get(name) != shapes.get(name))
        raise bad_argument("snapshot", got=f"other parameters ({', '.join(wrong[:4])})", expected="those of the model")
    sizes = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in parts.optimizers]
    found = [[group["params"] for group in optimizer["groups"]] for optimizer in state["optimizers"]]
    same = all((name in saved) == (name in shapes) for name in optional)  # else groups differ by them
    if found != sizes if same else list(map(len, found)) != list(map(len, sizes)):
        raise bad_argument("snapshot", got=f"optimizer groups of {found} parameters", expected=f"of {sizes}")
    if set(state["registered"]) != set(parts.registered):
        got, expected = f"registered objects {sorted(state['registered'])}", f"{sorted(parts.registered)}"
        remedy = "Register the same objects as in the saved run: compressor.register(...)"
        raise bad_argument("snapshot", got=got, expected=expected, remedy=remedy)
    if (state["ema"] is None) != (parts.ema is None):
        got, expected = ("no EMA" if state["ema"] is None else "an EMA"), ("none" if parts.ema is None else "one")
        raise bad_argument("snapshot", got=got, expected=expected)
    for name, home in state["homes"].items():
        place: Any = home if isinstance(name, str) else None
        torch.device(place)


def _module_state(module: nn.Module) -> dict[str, Any]:
    """Parameters, buffers (those that checkpoints leave out as well) and extra state."""
    extra = {
        name: part.get_extra_state()
        for name, part in module.named_modules()
        if type(part).get_extra_state is not nn.Module.get_extra_state
    }
    return {"parameters": dict(module.named_parameters()), "buffers": dict(module.named_buffers()), "extra": extra}


def _fill_module(module: nn.Module, state: Mapping[str, Any]) -> None:
    for name, value in state["parameters"].items():
        owner, leaf = holder(module, name)
        old = own_parameter(module, name)
        if old.shape == value.shape:
            old.copy_(value)
        else:
            new = nn.Parameter(placed_like(value.to(old.device, copy=True), old), requires_grad=old.requires_grad)
            new.__dict__.update(old.__dict__)
            owner._parameters[leaf] = new
    for name, value in state["buffers"].items():
        owner, leaf = holder(module, name)
        _fill_slot(owner._buffers, leaf, value)


def _fill_extra(module: nn.Module, extra: Mapping[str, Any]) -> None:
    for name, value in extra.items():
        module.get_submodule(name).set_extra_state(value)


def _fill_mapping(target: Any, values: Mapping[str, Tensor]) -> None:
    for name in set(target) - set(values):
        del target[name]
    for name, value in values.items():
        _fill_slot(target, name, value)


def _fill_slot(container: Any, key: str, value: Tensor) -> None:
    """Into the tensor that is there if it has the shape, else as a new one."""
    old = container.get(key)
    if isinstance(old, Tensor) and old.shape == value.shape and old.dtype == value.dtype:
        with torch.inference_mode() if old.is_inference() else nullcontext():  # elsewhere it cannot be changed
            old.copy_(value)
    else:
        fresh = value.to(old.device if isinstance(old, Tensor) else "cpu", copy=True)
        container[key] = placed_like(fresh, old) if isinstance(old, Tensor) else fresh


def _registered_state(item: Any) -> Any:
    if isinstance(item, torch.Generator):
        return item.get_state()
    return item if isinstance(item, dict) else item.state_dict()


def _fill_registered(item: Any, state: Any) -> None:
    if isinstance(item, torch.Generator):
        item.set_state(state)
    elif isinstance(item, dict):
        item.clear()
        item.update(state)
    else:
        item.load_state_dict(state)
