"""Whether the tensors of a checkpoint fit a model: their names, kinds, values and shapes, and what to say where they do not."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters.parameters import own_parameter
from compressm.compression.common.models import Layers
from compressm.compression.surgery.audit import full_name
from compressm.compression.surgery.packed_optimizer import extremes
from compressm.errors import CheckpointError


class PartialLoadWarning(UserWarning):
    """``load(strict=False)`` has left something out."""


def persistent(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by state_dict name.

    Raises:
        CheckpointError: a module has extra state (``get_extra_state``), which would be lost.
    """
    state = model.state_dict()
    foreign = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if foreign:
        raise CheckpointError(f"model: extra state {foreign[:4]} is no tensor and cannot be stored. Pass it as extra=")
    return dict(state)


def check_model(model: nn.Module, state: dict[str, Any], reshaped: set[str], strict: bool) -> dict[str, Tensor]:
    """Names, kinds and values of the model's tensors, and shapes of those that will not be reshaped; returns those to fill."""
    own = persistent(model)
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    if missing or unexpected:
        lists = f"missing {listed(missing)}, unexpected {listed(unexpected)}{closest(missing, unexpected)}"
        if strict:
            raise CheckpointError(f"does not fit the model: {lists}. Build it as it was saved, or load with strict=False")
        warnings.warn(f"the checkpoint fits the model in part: {lists}", PartialLoadWarning, stacklevel=4)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    places: dict[tuple, str] = {}
    result = {name: state[name] for name in own if name in state}
    for name, saved in result.items():
        if own[name].is_meta:
            raise CheckpointError(f"{name} is on the meta device, expected memory to load into. Use model.to_empty(device=...)")
        _check_kind(name, saved, own[name])
        if name not in reshaped:
            check_shape(name, saved, own[name])
        check_values(name, saved, finite=name in parameters)
        twin = places.setdefault((own[name].data_ptr(), own[name].shape, own[name].stride()), name)
        if twin != name and own[name].numel() and not torch.equal(saved, state[twin]):
            raise CheckpointError(f"{name} and {twin} are one tensor in the model, but differ in the checkpoint")
    return result


def _check_kind(name: str, saved: Any, own: Tensor) -> None:
    """Floating-point tensors may change their precision, others nothing."""
    fits = isinstance(saved, Tensor) and saved.is_complex() == own.is_complex() and saved.dim() == own.dim()
    if not fits or (saved.dtype != own.dtype and saved.is_floating_point() != own.is_floating_point()):
        raise CheckpointError(f"{name} is {_kind(saved)}, expected {_kind(own)}")
    if saved.dtype == own.dtype:
        return
    if not (own.is_floating_point() or own.is_complex()):
        raise CheckpointError(f"{name} is {_kind(saved)}, expected {_kind(own)}")
    if all(map(math.isfinite, extremes(saved))) and not all(map(math.isfinite, extremes(saved.to(own.dtype)))):
        raise CheckpointError(f"{name} holds {saved.dtype} values that are too large for the model's {own.dtype}")


def check_values(name: str, value: Tensor, *, finite: bool) -> None:
    lowest, highest = extremes(value)
    if math.isnan(lowest) or (finite and not (math.isfinite(lowest) and math.isfinite(highest))):
        what = "NaN" if math.isnan(lowest) else "infinity"
        raise CheckpointError(f"{name} holds {what}: training has diverged. Go back to an earlier checkpoint")


def check_room(layers: Layers, ranks: Mapping[str, int], state: Mapping[str, Tensor]) -> None:
    """Layers that will be reshaped must have all their tensors, and those must be about as large as the rank says.

    Blank tensors are made before their exact shapes can be compared; a false rank must not exhaust the memory.
    """
    for name, rank in ranks.items():
        module, adapter = layers[name]
        now = adapter.rank(module)
        if rank == now:
            continue
        probe = 2 if now == 1 else 1
        for key, small in adapter.blank(module, probe).items():
            full = full_name(name, key)
            if full not in state:
                raise CheckpointError(f"{full} is missing, expected the tensors of {rank} states of layer {name!r}")
            slopes = [(b - a) / (now - probe) for a, b in zip(small.shape, own_parameter(module, key).shape, strict=True)]
            needed = math.prod(a + slope * (rank - probe) for a, slope in zip(small.shape, slopes, strict=True))
            if needed > 2 * state[full].numel() + 4096:
                got = tuple(state[full].shape)
                raise CheckpointError(f"{full} has shape {got}, expected {rank} states, as the ranks say of layer {name!r}")


def check_shape(name: str, saved: Tensor, own: Tensor) -> None:
    if saved.shape != own.shape:
        raise CheckpointError(f"{name} is {_kind(saved)}, expected {_kind(own)}")


def _kind(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def listed(names: Iterable[Any]) -> str:
    """The first names in order, for messages."""
    listed = sorted(map(str, names))
    return str([name[:80] for name in listed[:6]]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")


def closest(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """A hint where names differ by a prefix or by little."""
    candidates = [name for name in sorted(unexpected)[:1000] if len(name) <= 200]
    for name in sorted(missing)[:3]:
        for other in candidates:
            longer, shorter = (other, name) if len(other) > len(name) else (name, other)
            if longer.endswith(f".{shorter}"):
                where, prefix = ("checkpoint's" if longer == other else "model's"), longer.removesuffix(shorter)
                return f" (the {where} names begin with {prefix!r}: was the model wrapped, or is it a part?)"
        if found := difflib.get_close_matches(name[:200], candidates, 1):
            return f" (is {found[0]!r} what is {name!r} here?)"
    return ""
