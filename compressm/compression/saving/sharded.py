"""Checkpoints of sharded models: a folder of safetensors files, each written by the process that holds the tensors.

``torch.distributed.checkpoint`` writes and reads the tensors, in any number of processes; beside them lies ``compressm.json``
with the ranks, so that loading can reshape the layers first.  No pickle.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from compressm.compression.common.codec import decode
from compressm.compression.common.files import about, write_atomically
from compressm.compression.common.models import Layers, compressible_layers
from compressm.compression.common.undisturbed import ordinary
from compressm.compression.compressor.compressor import Compressor
from compressm.compression.distributed.team import ReplicatedTeam, Team
from compressm.compression.distributed.wrapped import team_of
from compressm.compression.saving.fitting import persistent
from compressm.compression.saving.manifest import check_progress, pack, saved_ranks
from compressm.compression.surgery.audit import OptimizerArgument, as_optimizers, full_name
from compressm.compression.surgery.edits import reshape
from compressm.compression.surgery.packed_optimizer import load_optimizer_state, named_groups, numbered
from compressm.errors import CheckpointError

FORMAT = 1
MANIFEST = "compressm.json"


def save_sharded(
    folder: str | Path,
    model: nn.Module,
    *,
    optimizer: OptimizerArgument = None,
    compressor: Compressor | None = None,
    extra: Any = None,
) -> Path:
    """Write model, optimizer state and compressor; all processes call it, each writes what it holds.

    The manifest is written last: a folder without it is no checkpoint.

    Args:
        folder: a new folder on a file system that all processes see.
        model: sharded by ``fully_shard``, or DistributedDataParallel, or plain.
        optimizer: one or several.
        compressor: for resuming in mid-schedule.
        extra: anything else, a tree of None, bool, int, float, str, list, tuple, dict and tensors, the same everywhere.

    Raises:
        CheckpointError: there is a checkpoint in the folder already, it cannot be written, or an optimizer has state of
            something that is no parameter.
        OptimizerError: a parameter in a group is not the model's.
    """
    folder, optimizers = Path(folder), as_optimizers(optimizer)
    team = team_of(model, optimizers)
    manifest, tensors = pack(team.model, optimizers, extra=extra)
    for optimizer, packed in zip(optimizers, manifest["optimizers"], strict=True):
        if more := packed["more"]:
            raise CheckpointError(f"{type(optimizer).__name__}: its state_dict has {sorted(more)}, which shards do not hold")
    manifest |= {"format": FORMAT, "compressor": None if compressor is None else compressor.state_dict()}
    odd = [name for name, value in tensors.items() if value.is_complex()]
    if odd:
        raise CheckpointError(f"{folder}: complex tensors {odd[:4]} cannot be stored in shards, expected real ones")
    manifest["tensors"] = {n: [str(value.dtype).removeprefix("torch."), list(value.shape)] for n, value in tensors.items()}
    with team.together("preparing the checkpoint's folder"):
        if team.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise CheckpointError(f"{folder}: is not empty, expected a new folder for every sharded checkpoint")
    with _torch_errors(folder):
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save({name: value.detach() for name, value in tensors.items()}, storage_writer=writer, process_group=_group(team))
    with team.together("writing the checkpoint's manifest"):
        if team.rank == 0:
            write_atomically(folder / MANIFEST, json.dumps(manifest).encode())
    return folder


def load_sharded(
    folder: str | Path, model: nn.Module, *, optimizer: OptimizerArgument = None, compressor: Compressor | None = None
) -> Any:
    """Read a checkpoint of :func:`save_sharded` on any number of processes; all call it.  Returns ``extra``.

    The model may be freshly built and sharded at full size: its layers are reshaped to the saved ranks first, inside FSDP's
    groups and the optimizers' as well.  Load before wrapping in DistributedDataParallel.

    Raises:
        CheckpointError: no such checkpoint, from a newer version, not of this model, or not readable.  Nothing has changed,
            unless files are damaged: then a part may have been read, and the message says so.
        ArgumentError, OptimizerError: the compressor has another recipe or other layers, or a parameter in an optimizer's group
            is not the model's; nothing has changed.
    """
    with ordinary():
        folder, optimizers = Path(folder), as_optimizers(optimizer)
        team = team_of(model, optimizers)
        layers = compressible_layers(team.model)
        with team.together("reading the checkpoint's manifest"), about(folder):
            manifest = _read_manifest(folder)
            changing = _check(manifest, team, layers, optimizers)
            if compressor is not None:
                check_progress(compressor, manifest["compressor"], manifest["ranks"])

        def apply(names: Sequence[str]) -> None:
            reshape(team.model, {name: layers[name] for name in names}, {n: manifest["ranks"][n] for n in names}, optimizers)

        team.carry_out(apply, {name: layers[name] for name in changing}, optimizers, None)
        targets = _targets(manifest, team.model, optimizers)
        with _torch_errors(folder, "; a part may have been read, load an earlier checkpoint"):
            dcp.load(targets, storage_reader=HuggingFaceStorageReader(str(folder)), process_group=_group(team))
        dtypes = {name.removeprefix("model/"): getattr(torch, dtype) for name, (dtype, _) in manifest["tensors"].items()}
        for item, saved in zip(optimizers, manifest["optimizers"], strict=False):
            load_optimizer_state(item, team.model, numbered(item, team.model, decode(saved, targets)), dtypes)
        extra = decode(manifest["extra"], targets)
        if compressor is not None:
            compressor.load_state_dict(manifest["compressor"])
        team.at_rest()
        return extra


def _check(manifest: Mapping[str, Any], team: Team, layers: Layers, optimizers: Sequence[Any]) -> list[str]:
    """Compare the manifest with model and optimizers; returns the layers to reshape."""
    ranks = saved_ranks(manifest, layers)
    changing = [name for name, (module, adapter) in layers.items() if adapter.rank(module) != ranks[name]]
    if changing and isinstance(team, ReplicatedTeam):
        raise CheckpointError("has other ranks than the model. Load into the plain model and wrap it afterwards")
    shapes = {f"model/{name}": list(value.shape) for name, value in persistent(team.model).items()}
    for name in changing:
        module, adapter = layers[name]
        blank = adapter.blank(module, ranks[name])
        shapes |= {f"model/{full_name(name, key)}": list(value.shape) for key, value in blank.items()}
    held = {name: shape for name, (_, shape) in manifest["tensors"].items() if name.startswith("model/")}
    if held != shapes:
        wrong = [name for name in sorted(held.keys() | shapes.keys()) if held.get(name) != shapes.get(name)]
        raise CheckpointError(f"does not fit the model: {wrong[:4]}. Build it as it was saved")
    now = [named_groups(optimizer, team.model) for optimizer in optimizers]
    saved = [[group["params"] for group in state["groups"]] for state in manifest["optimizers"]]
    if optimizers and saved != now:
        raise CheckpointError("its optimizer groups hold other parameters, expected those of these optimizers")
    return changing


def _targets(manifest: Mapping[str, Any], model: nn.Module, optimizers: Sequence[Any]) -> dict[str, Tensor]:
    """Tensors to read into: the model's own, and blank ones sharded like the parameters they belong to."""
    own = {f"model/{name}": value.detach() for name, value in persistent(model).items()}
    parameters = dict(model.named_parameters())
    like: dict[str, nn.Parameter | None] = {}
    for number, state in enumerate(manifest["optimizers"]):
        for name, entries in state["state"].items():
            like |= {f"optimizers/{number}/state/{name}/{key}": parameters.get(name) for key in entries}
    targets = {}
    for name, (dtype, shape) in manifest["tensors"].items():
        parameter = like.get(name)
        if name in own:
            targets[name] = own[name]
        elif name.startswith("optimizers/") and not optimizers:
            continue  # not read
        elif parameter is not None and list(parameter.shape) == shape:
            targets[name] = torch.zeros_like(parameter.detach(), dtype=getattr(torch, dtype))
        else:
            targets[name] = torch.zeros(shape, dtype=getattr(torch, dtype), device="cpu")
    return targets


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"has no {MANIFEST}, expected a folder written by save_sharded") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"its {MANIFEST} is not readable as JSON ({error})") from error
    keys = {"format", "ranks", "model", "optimizers", "compressor", "extra", "tensors"}
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int) or keys - manifest.keys():
        raise CheckpointError(f"its {MANIFEST} was not written by save_sharded")
    if manifest["format"] > FORMAT:
        raise CheckpointError(f"format {manifest['format']} is newer than {FORMAT}. Upgrade compressm")
    for name, entry in manifest["tensors"].items():
        dtype = getattr(torch, str(entry[0]), None) if isinstance(entry, list) and len(entry) == 2 else None
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"tensor {name!r} is described as {entry!r}, expected a dtype and a shape")
    return manifest


@contextmanager
def _torch_errors(folder: Path, more: str = "") -> Iterator[None]:
    """Errors of torch.distributed.checkpoint as ours."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is .*")
            yield
    except dcp.api.CheckpointException as error:
        raise CheckpointError(f"{folder}: torch.distributed.checkpoint failed ({str(error)[:300]}){more}") from error


def _group(team: Team) -> Any:
    return getattr(team, "group", None)
