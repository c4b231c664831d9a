"""What a checkpoint says, apart from any file: packing a run into a manifest and tensors, and putting it back.

The manifest is a JSON tree that names every tensor exactly once:

    format      of this layout, an int
    compressm   version that wrote it
    ranks       states by name of the state-space layer
    dtypes      of their parameters, by the same names
    model       state_dict name to tensor
    optimizers  one entry per optimizer: groups and state by parameter name
    compressor  ``Compressor.state_dict()``: recipe, step, history of reductions, ...; or null
    rng         states of the random generators, or null
    extra       the caller's own tree

:func:`check` compares everything with the targets before anything changes, and :class:`Restoration` changes all or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressm._version import __version__
from compressm.adapters import Adapter
from compressm.adapters.parameters import own_parameter
from compressm.compression.common import random_states
from compressm.compression.common.codec import decode, encode
from compressm.compression.common.models import Layers, compressible_layers
from compressm.compression.compressor.compressor import Compressor
from compressm.compression.saving.fitting import (
    check_model,
    check_room,
    check_shape,
    check_values,
    closest,
    listed,
    persistent,
)
from compressm.compression.surgery.audit import Optimizers, full_name
from compressm.compression.surgery.edits import reshape
from compressm.compression.surgery.optional import give, make_alike, unlike, wanted
from compressm.compression.surgery.packed_optimizer import (
    check_optimizer_state,
    keep_optimizer,
    load_optimizer_state,
    pack_optimizer,
)
from compressm.compression.surgery.references import References, Undo, put_list, put_mapping, take_back
from compressm.errors import CheckpointError

FORMAT = 1
KEYS = frozenset({"format", "compressm", "ranks", "dtypes", "model", "optimizers", "compressor", "rng", "extra"})
MAX_RANK = 1 << 20


def pack(
    model: nn.Module,
    optimizers: Optimizers = (),
    compressor: Compressor | None = None,
    extra: Any = None,
    *,
    rng: bool = False,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest of a run and the tensors it names; these are the run's own, not copies.

    Raises:
        CheckpointError, OptimizerError: something cannot be stored.
    """
    layers = compressible_layers(model)
    tensors: dict[str, Tensor] = {}
    manifest = {
        "format": FORMAT,
        "compressm": __version__,
        "ranks": {name: adapter.rank(module) for name, (module, adapter) in layers.items()},
        "dtypes": {
            name: str(own_parameter(module, adapter.parameters(module)[0]).dtype).removeprefix("torch.")
            for name, (module, adapter) in layers.items()
        },
        "model": encode(persistent(model), "model", tensors),
        "optimizers": encode([pack_optimizer(o, model) for o in optimizers], "optimizers", tensors),
        "compressor": encode(None if compressor is None else compressor.state_dict(), "compressor", tensors),
        "rng": encode(random_states.capture(model) if rng else None, "rng", tensors),
        "extra": encode(extra, "extra", tensors),
    }
    return manifest, tensors


def check_numbers(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a diverged run: NaN in the model's or the optimizers' tensors, or infinite parameters (buffers may be infinite).

    Args:
        model: the model that was packed.
        tensors: from :func:`pack`, or copies of them.

    Raises:
        CheckpointError: names the tensor.
    """
    parameters = {f"model/{name}" for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in tensors.items():
        if name.startswith(("model/", "optimizers/")):
            check_values(name, value, finite=name in parameters)


@dataclass(frozen=True)
class Restoration:
    """A checkpoint that fits its targets; nothing has changed yet.

    Attributes:
        model, layers, optimizers, compressor: the targets.
        ranks: of those layers that the checkpoint has.
        state: the model's tensors by state_dict name.
        ready: per optimizer, what its ``load_state_dict`` takes.
        progress: the compressor's state.
        rng: states of the random generators, or None to leave them.
        extra: the caller's own tree.
    """

    model: nn.Module
    layers: Layers
    optimizers: Optimizers
    compressor: Compressor | None
    ranks: Mapping[str, int]
    state: Mapping[str, Tensor]
    ready: Sequence[dict[str, Any]]
    progress: Mapping[str, Any] | None
    rng: Mapping[str, Any] | None
    extra: Any

    def apply(self) -> Any:
        """Reshape and fill the model, then optimizers, random generators and compressor; returns ``extra``.

        Whatever interrupts it, Ctrl-C included, everything is put back.  Until it ends, the values that are replaced are kept
        in CPU memory.

        Raises:
            CheckpointError: a tensor does not fit, or an optimizer refuses its state; nothing has changed.
        """
        changing = {name: self.layers[name] for name in self.ranks}
        done: list[Undo] = [References(changing, self.optimizers, None).restore]
        try:
            reshape(self.model, self.layers, self.ranks, self.optimizers)
            own = persistent(self.model)
            for name, saved in self.state.items():
                check_shape(name, saved, own[name])
            before = {name: own[name].to("cpu", copy=True) for name in self.state}
            done.append(partial(_fill, own, before))
            _fill(own, self.state)
            for optimizer, ready in zip(self.optimizers, self.ready, strict=True):
                done += keep_optimizer(optimizer)
                load_optimizer_state(optimizer, self.model, ready, {name: saved.dtype for name, saved in self.state.items()})
            if self.rng is not None:
                done.append(partial(random_states.restore, random_states.capture(self.model), self.model))
                random_states.restore(self.rng, self.model)
            if self.compressor is not None:
                assert self.progress is not None  # checked when it was read
                done += _kept(self.compressor)
                self.compressor.load_state_dict(self.progress)
        except BaseException:
            take_back(done)
            raise
        return self.extra


@contextmanager
def optional_as_saved(model: nn.Module, manifest: Mapping[str, Any], optimizers: Optimizers) -> Iterator[None]:
    """Give the model's layers those optional parameters and buffers that a checkpoint has; an error inside takes them back."""
    saved = manifest.get("model")
    layers = compressible_layers(model)
    names = saved.keys() if isinstance(saved, Mapping) else ()
    fitting, other = wanted(layers, names), unlike(layers, names)
    before = References({name: layers[name] for name in {**fitting, **other}}, optimizers, None)
    try:
        give(layers, fitting, optimizers)
        make_alike(layers, other)
        yield
    except BaseException:
        before.restore()
        raise


def check(
    manifest: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    optimizers: Optimizers = (),
    compressor: Compressor | None = None,
    *,
    strict: bool = True,
    rng: bool = False,
) -> Restoration:
    """Compare a checkpoint with its targets.  Changes nothing, and trusts nothing that it reads.

    Args:
        manifest: JSON tree.
        tensors: those that it names, and no others.
        model: may have other ranks.
        optimizers: as many as were saved; none: their state is left.
        compressor: None: its state is left.
        strict: the model's tensors must be exactly those of the checkpoint; else what both have is taken, with a warning.
        rng: restore the random generators as well.

    Raises:
        CheckpointError: malformed, or of another model or optimizer.
        ArgumentError: the compressor has another recipe or other layers.
        OptimizerError: an optimizer holds parameters that are not the model's.
    """
    layers = compressible_layers(model)
    if manifest.keys() != KEYS:
        raise CheckpointError(f"manifest: has {sorted(manifest)!s:.200}, expected {sorted(KEYS)}")
    left = dict(tensors)
    state = _section(manifest, "model", left, dict)
    saved = _section(manifest, "optimizers", left, list)
    progress = _section(manifest, "compressor", left, dict | None)
    generators = _section(manifest, "rng", left, dict | None)
    extra = decode(manifest["extra"], left)
    if left:
        raise CheckpointError(f"holds tensors that its manifest does not name: {listed(left)}. It has been changed")
    ranks = saved_ranks(manifest, layers, strict=strict)
    reshaped = {full_name(name, key) for name, rank in ranks.items() for key in _reshaped(*layers[name], rank)}
    state = check_model(model, state, reshaped, strict)
    check_room(layers, ranks, state)
    if optimizers and len(saved) != len(optimizers):
        remedy = "Pass as many optimizers as were saved, or none"
        raise CheckpointError(f"holds the state of {len(saved)} optimizers, expected {len(optimizers)}. {remedy}")
    shapes = {**dict(model.named_parameters()), **state}
    ready = [check_optimizer_state(o, model, s, shapes) for o, s in zip(optimizers, saved, strict=False)]
    if compressor is not None:
        check_progress(compressor, progress, manifest["ranks"])
    if rng and generators is None:
        raise CheckpointError("holds no states of random generators. Save with rng=True, or load without")
    if rng:
        random_states.check(generators, model)
    return Restoration(model, layers, optimizers, compressor, ranks, state, ready, progress, generators if rng else None, extra)


def saved_ranks(manifest: Mapping[str, Any], layers: Layers, *, strict: bool = True) -> dict[str, int]:
    """The checked ranks of those layers that the checkpoint has; with ``strict`` these must be all, and no others.

    Raises:
        CheckpointError: they are not, or a rank is no positive integer.
    """
    ranks = manifest.get("ranks")
    if not isinstance(ranks, dict):
        raise CheckpointError(f"manifest: ranks are a {type(ranks).__name__}, expected a dict")
    if strict and ranks.keys() != layers.keys():
        hint = closest(layers.keys() - ranks.keys(), ranks.keys() - layers.keys())
        raise CheckpointError(f"state-space layers {listed(ranks)}, expected {listed(layers)}, as the model has{hint}")
    for name, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
            raise CheckpointError(f"manifest: rank {rank!r:.80} of layer {name!r:.80}, expected a positive integer")
    return {name: rank for name, rank in ranks.items() if name in layers}


def check_progress(compressor: Compressor, progress: Mapping[str, Any] | None, ranks: Mapping[str, int]) -> None:
    """Raise CheckpointError or ArgumentError unless a saved state fits the compressor, and the ranks saved beside it."""
    if progress is None:
        raise CheckpointError("holds no compressor state. Load it without compressor=, or save with one")
    compressor.check_state_dict(progress)
    if dict(progress["ranks"]) != ranks:
        raise CheckpointError(
            f"its compressor state has ranks {progress['ranks']!s:.200} and its model {ranks!s:.200}, expected the same. "
            "Save a model together with its own compressor"
        )


def _section(manifest: Mapping[str, Any], name: str, tensors: dict[str, Tensor], kind: Any) -> Any:
    value = decode(manifest[name], tensors)
    if not isinstance(value, kind):
        raise CheckpointError(f"manifest: {name} is a {type(value).__name__}, expected another type")
    return value


def _reshaped(module: nn.Module, adapter: Adapter, rank: int) -> tuple[str, ...]:
    """Names, relative to a layer, of its parameters and buffers that change if that rank is another than now."""
    if adapter.rank(module) == rank:
        return ()
    buffers = (name for name, value in adapter.attributes(module, rank).items() if isinstance(value, Tensor))
    return (*adapter.parameters(module), *buffers)


@torch.no_grad()
def _fill(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        own[name].copy_(value)


def _kept(compressor: Compressor) -> list[Undo]:
    """What puts a compressor with its guard and its cadence back as they are, changes inside of their lists included."""
    undo: list[Undo] = []
    for part in (compressor, compressor.guard, compressor._cadence):
        if part is not None:
            undo.append(partial(put_mapping, vars(part), dict(vars(part))))
            undo += [partial(put_list, value, list(value)) for value in vars(part).values() if type(value) is list]
            undo += [partial(put_mapping, value, dict(value)) for value in vars(part).values() if type(value) is dict]
    return undo
