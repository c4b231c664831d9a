"""Checkpoints: one safetensors file whose header carries a JSON manifest; no pickle.

A file is written under a temporary name beside its target, flushed to disk and renamed, so that the target is always the
old checkpoint or the new one, never a part.  Reading checks everything before the model is touched.  What the manifest says
is in :mod:`compressm.compression.saving.manifest`.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from compressm.compression.common.codec import from_storable, to_storable
from compressm.compression.common.files import about, flush_folder, write_atomically
from compressm.compression.common.models import plain_model
from compressm.compression.common.undisturbed import ordinary
from compressm.compression.compressor.compressor import Compressor
from compressm.compression.saving.manifest import FORMAT, check, check_numbers, optional_as_saved, pack
from compressm.compression.surgery.audit import OptimizerArgument, as_optimizers
from compressm.errors import CheckpointError
from compressm.inputs import MAX_HEADER, check_checkpoint, unreadable

KEY = "compressm"
COMPLEX = "complex"
CHECKSUM = "crc32"
MAX_TENSORS = 1 << 16


def save(
    path: str | Path,
    model: nn.Module,
    *,
    optimizer: OptimizerArgument = None,
    compressor: Compressor | None = None,
    extra: Any = None,
    rng: bool = False,
) -> Path:
    """Write model, optimizer state and compressor to one safetensors file.

    Args:
        path: target; its folder must exist.
        model: parameters and persistent buffers are stored under their state_dict names.
        optimizer: one or several; state is stored by parameter name.
        compressor: for resuming in mid-schedule.
        extra: anything else, a tree of None, bool, int, float, str, list, tuple, dict and tensors; a scheduler's
            ``state_dict()``, say.
        rng: also store the states of the random generators of torch (CPU and the model's GPUs), numpy and Python, so that
            dropout and shuffling go on as they would have.

    Returns:
        ``path``.

    Raises:
        CheckpointError: the file cannot be written, something in the state cannot be stored, or training has diverged
            (infinite parameters, NaN in the model or in optimizer state); a checkpoint that was there before is still there.
        OptimizerError: the optimizer is not this model's.
    """
    path, model = Path(path), plain_model(model, ddp=True)
    with about(path):
        manifest, tensors = pack(model, as_optimizers(optimizer), compressor, extra, rng=rng)
        storable, complex_names = to_storable(tensors)
        check_numbers(model, storable)
        text = json.dumps({**manifest, COMPLEX: complex_names}, allow_nan=False)
        data = to_bytes(storable, metadata={KEY: text, CHECKSUM: _checksum(text, storable)})
        _check_size(struct.unpack("<Q", data[:8])[0], len(storable))
    _write(path, data)
    return path


def load(
    path: str | Path,
    model: nn.Module,
    *,
    optimizer: OptimizerArgument = None,
    compressor: Compressor | None = None,
    strict: bool = True,
    rng: bool = False,
) -> Any:
    """Read a checkpoint into a model, and optionally into optimizer and compressor; returns ``extra``.

    The model may be freshly built at full size: its layers are reshaped to the saved ranks first, inside the optimizer's
    groups as well.  Tensors go to the devices where the model's are, and take their precision; optimizer state keeps the
    saved one where the parameter has.

    Args:
        path: written by :func:`save`.
        model: built as the saved one was, of any ranks.
        optimizer: as many as were saved, over the same parameters in the same groups.
        compressor: of the same recipe.
        strict: the model's tensors must be exactly those in the file.  False: what both have is taken (shapes must fit), and
            a PartialLoadWarning lists the rest.
        rng: also restore the random generators, which must have been saved.

    Raises:
        CheckpointError: no such file, damaged, from a newer version, not of this model, or it holds NaN or infinite
            parameters; nothing has changed.
        ArgumentError: the compressor has another recipe or other layers; nothing has changed.
        OptimizerError: the optimizer is not this model's; nothing has changed.
    """
    model, optimizers = plain_model(model), as_optimizers(optimizer)
    with ordinary():
        manifest, tensors = read(path)
        with about(path), optional_as_saved(model, manifest, optimizers):
            return check(manifest, tensors, model, optimizers, compressor, strict=strict, rng=rng).apply()


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest and the tensors of a checkpoint; their memory is their own, not the file's.

    Raises:
        CheckpointError: no such file, damaged, or from a newer version.
    """
    check_checkpoint(path)
    with about(path):
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                manifest = _parse(metadata.get(KEY))
                _check_size(0, len(file.keys()))
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise unreadable(f"not readable as safetensors ({error})") from error
        if metadata.get(CHECKSUM) != _checksum(metadata[KEY], tensors):
            raise CheckpointError("its checksum does not fit its content, the file is damaged. Use an earlier checkpoint")
        return manifest, from_storable(tensors, manifest.pop(COMPLEX, None))


def _check_size(header: int, count: int) -> None:
    """What :func:`read` would refuse must not be written."""
    if header > MAX_HEADER or count > MAX_TENSORS:
        raise CheckpointError(
            f"{count} tensors and a header of {header} bytes, at most {MAX_TENSORS} and {MAX_HEADER} are allowed. "
            "Shorten extra, or delete the first entries of compressor.history"
        )


def _parse(text: str | None) -> dict[str, Any]:
    """The manifest as strict JSON of a format that we know."""
    if text is None:
        raise unreadable("has no compressm manifest")
    try:
        manifest = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its manifest is not JSON ({error!s:.200}); was it written by compressm.save?") from error
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int or manifest["format"] < 1:
        raise unreadable("has no compressm manifest")
    if manifest["format"] > FORMAT:
        got, version = f"{manifest['format']!r:.20}", f"{manifest.get('compressm')!s:.20}"
        raise CheckpointError(f"format {got} (compressm {version}) is newer than {FORMAT}. Upgrade compressm")
    return manifest


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomically(path, data)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror or error}); {len(data)} bytes are needed. Free space or choose another"
            " folder; an earlier checkpoint of this name is untouched"
        ) from error
    try:
        flush_folder(path)
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
        crc = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
