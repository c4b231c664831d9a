"""Checkpoints: one safetensors file whose header carries a JSON manifest; no pickle.

A file is written under a temporary name beside its target, flushed to disk and renamed, so that the target is always the
old checkpoint or the new one, never a part.  Reading checks everything before the model is touched.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import compressm
from compressm.adapters import Adapter
from compressm.compression.audit import ELEMENTWISE
from compressm.compression.codec import decode, encode, to_storable
from compressm.compression.compressor import Compressor
from compressm.compression.execution import as_optimizers
from compressm.compression.planning import compressible_layers, plain_model
from compressm.compression.surgery import reshape
from compressm.errors import CheckpointError, OptimizerError

FORMAT = 1
KEY = "compressm"
CHECKSUM = "crc32"

Layers = Mapping[str, tuple[nn.Module, Adapter]]
OptimizerArgument = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


def save(
    path: str | Path,
    model: nn.Module,
    *,
    optimizer: OptimizerArgument = None,
    compressor: Compressor | None = None,
    extra: Any = None,
) -> Path:
    """Write model, optimizer state and compressor to one safetensors file.

    Args:
        path: target; its folder must exist.
        model: parameters and persistent buffers are stored under their state_dict names.
        optimizer: one or several; state is stored by parameter name.
        compressor: for resuming in mid-schedule.
        extra: anything else, a tree of None, bool, int, float, str, list, tuple, dict and tensors.

    Raises:
        CheckpointError: the file cannot be written, or something in the state cannot be stored; a checkpoint that was there
            before is still there.
    """
    path, model = Path(path), plain_model(model, ddp=True)
    layers = compressible_layers(model)
    tensors: dict[str, Tensor] = {}
    manifest = {
        "format": FORMAT,
        "compressm": compressm.__version__,
        "ranks": {name: adapter.rank(module) for name, (module, adapter) in layers.items()},
        "model": encode(_persistent(model), "model", tensors),
        "optimizers": encode([_optimizer_state(o, model) for o in as_optimizers(optimizer)], "optimizers", tensors),
        "compressor": encode(None if compressor is None else compressor.state_dict(), "compressor", tensors),
        "extra": encode(extra, "extra", tensors),
    }
    storable, manifest["complex"] = to_storable(tensors)
    text = json.dumps(manifest)
    _write(path, to_bytes(storable, metadata={KEY: text, CHECKSUM: _checksum(text, storable)}))
    return path


def load(
    path: str | Path,
    model: nn.Module,
    *,
    optimizer: OptimizerArgument = None,
    compressor: Compressor | None = None,
) -> Any:
    """Read a checkpoint into a model, and optionally into optimizer and compressor; returns ``extra``.

    The model may be freshly built at full size: its layers are reshaped to the saved ranks first, inside the optimizer's
    groups as well.  Tensors go to the devices where the model's are.

    Raises:
        CheckpointError: no such file, damaged, from a newer version, or not of this model; nothing has changed.
        ArgumentError: the compressor has another recipe or other layers; nothing has changed.
    """
    model = plain_model(model)
    manifest, tensors = read(path)
    optimizers, layers = as_optimizers(optimizer), compressible_layers(model)
    state = _section(manifest, "model", tensors, dict)
    saved = _section(manifest, "optimizers", tensors, list)
    ranks = _ranks(manifest, layers)
    if optimizers and len(saved) != len(optimizers):
        raise CheckpointError(f"{path}: holds the state of {len(saved)} optimizers, expected {len(optimizers)}")
    progress = _section(manifest, "compressor", tensors, dict | None)
    if compressor is not None:
        if progress is None:
            raise CheckpointError(f"{path}: holds no compressor state. Load it without compressor=, or save with one")
        compressor.check_state_dict(progress)
        if dict(progress["ranks"]) != ranks:
            raise CheckpointError(
                f"{path}: its compressor state has ranks {progress['ranks']} and its model {ranks}, expected the same. "
                "Save a model together with its own compressor"
            )
    extra = decode(manifest.get("extra"), tensors)
    undo = reshape(model, layers, ranks, optimizers)
    complete = False
    try:
        _check_tensors(path, model, state)
        states = [_checked_optimizer_state(path, o, model, s) for o, s in zip(optimizers, saved, strict=False)]
        complete = True
    finally:
        if not complete:
            undo()
    _fill(model, state)
    for target, ready in zip(optimizers, states, strict=True):
        target.load_state_dict(ready)
    if compressor is not None:
        compressor.load_state_dict(progress)
    return extra


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest and the tensors of a checkpoint.

    Raises:
        CheckpointError: no such file, damaged, or from a newer version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata.get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"not readable as safetensors ({error})"
        raise CheckpointError(f"{path}: {reason}, expected a checkpoint written by compressm.save") from error
    try:
        manifest = json.loads(text) if text is not None else None
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its manifest is not JSON ({error}); was it written by compressm.save?") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise CheckpointError(f"{path}: has no compressm manifest, expected a checkpoint written by compressm.save")
    if manifest["format"] > FORMAT:
        got, version = manifest["format"], manifest.get("compressm")
        raise CheckpointError(f"{path}: format {got} (compressm {version}) is newer than {FORMAT}. Upgrade compressm")
    if metadata.get(CHECKSUM) != _checksum(text, tensors):
        raise CheckpointError(f"{path}: its checksum does not fit its content, the file is damaged. Use an earlier checkpoint")
    for name in manifest.get("complex", []):
        if name not in tensors or tensors[name].shape[-1:] != (2,):
            raise CheckpointError(f"{path}: complex tensor {name!r} is missing or malformed")
        tensors[name] = torch.view_as_complex(tensors[name])
    return manifest, tensors


def _write(path: Path, data: bytes) -> None:
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror or error}); {len(data)} bytes are needed. Free space or choose another"
            " folder; an earlier checkpoint of this name is untouched"
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    _flush_folder(path)


def _flush_folder(path: Path) -> None:
    """Make the renaming last through a power cut."""
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise CheckpointError(
            f"{path}: written, but its folder cannot be flushed to disk ({error.strerror or error}); after a power cut the "
            "earlier checkpoint may be there instead"
        ) from error


def _checksum(manifest: str, tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of the manifest and the tensors, dtypes and shapes included; safetensors has none."""
    crc = zlib.crc32(manifest.encode())
    for name in sorted(tensors):
        value = tensors[name]
        crc = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), crc)
        crc = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def _persistent(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers.

    Raises:
        CheckpointError: a module has extra state (``get_extra_state``), which would be lost.
    """
    state = model.state_dict()
    foreign = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if foreign:
        raise CheckpointError(f"model: extra state {foreign[:4]} is no tensor and cannot be stored. Pass it as extra=")
    return dict(state)


def _optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """state_dict with parameter names for indices.

    Raises:
        OptimizerError: a parameter in a group is not the model's.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups, state = [], {}
    for index, group in enumerate(optimizer.param_groups):
        foreign = [tuple(p.shape) for p in group["params"] if id(p) not in names]
        if foreign:
            raise OptimizerError(
                f"optimizer: group {index} holds parameters that are not the model's (shapes {foreign[:3]}), expected its own"
            )
        groups.append({**group, "params": [names[id(p)] for p in group["params"]]})
        state |= {names[id(p)]: dict(optimizer.state[p]) for p in group["params"] if optimizer.state.get(p)}
    return {"groups": groups, "state": state}


def _checked_optimizer_state(
    path: str | Path, optimizer: torch.optim.Optimizer, model: nn.Module, saved: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``optimizer.load_state_dict`` takes, after checking that groups and shapes fit."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    now = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
    if not isinstance(saved, Mapping) or [group.get("params") for group in saved.get("groups", [])] != now:
        raise CheckpointError(f"{path}: its optimizer groups hold other parameters, expected those of this optimizer")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    numbers = {name: i for i, name in enumerate(name for group in now for name in group)}
    state = {}
    for name, entries in saved["state"].items():
        if name not in numbers or not isinstance(entries, Mapping):
            raise CheckpointError(f"{path}: optimizer state of {name!r}, expected a parameter of this optimizer")
        for key, value in entries.items():
            if key in ELEMENTWISE and isinstance(value, Tensor) and value.shape != shapes[name]:
                got, expected = tuple(value.shape), tuple(shapes[name])
                raise CheckpointError(f"{path}: optimizer state {key} of {name!r} has shape {got}, expected {expected}")
        state[numbers[name]] = dict(entries)
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in saved["groups"]]
    return {"state": state, "param_groups": groups}


def _section(manifest: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor], kind: Any) -> Any:
    value = decode(manifest.get(name), tensors)
    if not isinstance(value, kind):
        raise CheckpointError(f"manifest: section {name} is a {type(value).__name__}, expected {kind}")
    return value


def _ranks(manifest: Mapping[str, Any], layers: Layers) -> dict[str, int]:
    ranks = manifest.get("ranks")
    if not isinstance(ranks, dict) or set(ranks) != set(layers):
        got = sorted(ranks) if isinstance(ranks, dict) else ranks
        raise CheckpointError(f"manifest: state-space layers {got}, expected {sorted(layers)}, as the model has")
    for name, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= 1 << 20:
            raise CheckpointError(f"manifest: rank {rank!r} of layer {name!r}, expected a positive integer")
    return ranks


def _check_tensors(path: str | Path, model: nn.Module, state: Mapping[str, Any]) -> None:
    own = _persistent(model)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{path}: does not fit the model: missing {missing[:4]}, unexpected {unexpected[:4]}. Build it as it was saved"
        )
    for name, value in own.items():
        saved = state[name]
        if not isinstance(saved, Tensor) or saved.shape != value.shape or saved.is_complex() != value.is_complex():
            got = f"{tuple(saved.shape)} {saved.dtype}" if isinstance(saved, Tensor) else type(saved).__name__
            raise CheckpointError(f"{path}: {name} is {got}, expected {tuple(value.shape)} {value.dtype}")


@torch.no_grad()
def _fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, value in _persistent(model).items():
        value.copy_(state[name])
