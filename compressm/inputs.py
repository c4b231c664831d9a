"""What files, folders and words of a command must be, looked at before torch is loaded, which takes seconds."""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from compressm.errors import CheckpointError, ConfigError, DataError

MAX_HEADER = 32 << 20  # bytes of a checkpoint; reading one takes a second or two
DEVICES = ("cpu", "cuda", "hpu", "maia", "mps", "mtia", "privateuseone", "xla", "xpu")


def unreadable(reason: str) -> CheckpointError:
    """For a file that is no checkpoint."""
    return CheckpointError(f"{reason}, expected a checkpoint written by compressm.save")


def check_checkpoint(path: str | Path) -> None:
    """Refuse what is no regular file, no safetensors file, and oversized headers.

    Raises:
        CheckpointError: one of these.
    """
    try:
        if not os.path.isfile(path):
            no = "not readable as safetensors (no regular file)" if os.path.exists(path) else "no such file"
            inside = sorted(found.name for found in Path(path).glob("*.safetensors")) if os.path.isdir(path) else []
            raise unreadable(f"{path}: " + (f"is a folder, with {', '.join(inside)} in it" if inside else no))
        with open(path, "rb") as file:
            head = file.read(8)
    except (OSError, ValueError) as error:
        raise unreadable(f"{path}: not readable as safetensors ({error})") from error
    if len(head) < 8:
        raise unreadable(f"{path}: not readable as safetensors ({len(head)} bytes)")
    length = struct.unpack("<Q", head)[0]
    if length > MAX_HEADER:
        raise unreadable(
            f"{path}: not readable as safetensors (a header of {length} bytes, at most {MAX_HEADER} are allowed)"
        )


def report_file(path: Path) -> Path:
    """The report of a folder that ``compressm train`` wrote, or of that file itself.

    Raises:
        DataError: there is none.
    """
    file = path / "report.json" if os.path.isdir(path) else path
    if not os.path.isfile(file):
        if os.path.isfile(path / "command.json"):
            raise DataError(f"{path}: is unfinished. Continue it with compressm train PRESET --resume --out {path}")
        raise DataError(f"{file}: no such file, expected the report.json that compressm train writes into its --out folder")
    return file


def check_model_folder(path: Path) -> None:
    """Refuse what ``save_pretrained`` of transformers did not write.

    Raises:
        CheckpointError: no folder, or one without a config.
    """
    if not os.path.isdir(path):
        raise CheckpointError(f"{path}: no such folder, expected one that save_pretrained wrote")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: has no config.json, expected a folder that save_pretrained wrote")


def check_new_folder(out: Path) -> None:
    """Refuse to write where something is.

    Raises:
        CheckpointError: ``out`` is a file, or a folder that is not empty.
    """
    if os.path.exists(out) and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"--out {out}: exists already, expected a new or an empty folder. Nothing was written")


def check_writable(option: str, path: Path, *, file: bool = False) -> None:
    """Refuse what cannot be written, as far as that shows beforehand, before a long work is done for it.

    Args:
        option: that names it, for the message.
        path: a folder, which may be made with those above it.
        file: it is a file in such a folder.

    Raises:
        CheckpointError: it is the other of the two, its name is too long, or its folder is none or cannot be written to.
    """
    expected = "a file in a folder that can be written" if file else "a folder that can be written"
    if file and os.path.isdir(path):
        raise CheckpointError(f"{option} {path}: is a folder, expected {expected}")
    place = path.absolute().parent if file else path.absolute()
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise CheckpointError(f"{option} {path}: {error.strerror}, expected {expected}") from error
    while not os.path.lexists(place):
        place = place.parent
    if not os.path.isdir(place):
        raise CheckpointError(f"{option} {path}: {place} is no folder, expected {expected}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise CheckpointError(f"{option} {path}: {place} cannot be written to, expected {expected}")


def check_installed(packages: Sequence[str]) -> None:
    """Raise ModuleNotFoundError for the first package that is not there, as importing it would, which takes longer."""
    for name in packages:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def check_there(paths: Sequence[Path]) -> None:
    """Raise DataError for the first path that does not exist."""
    for path in paths:
        if not os.path.exists(path):
            raise DataError(f"--data {path}: no such file or folder")


def require_folder(folder: Path | None) -> None:
    """Raise DataError if a folder is given that does not exist."""
    if folder is not None and not os.path.isdir(folder):
        raise DataError(f"--data-dir {folder}: no such folder, expected one with the dataset's files. Omit it to download them")


def check_device(name: str) -> None:
    """Raise ConfigError if no device is called so, here or elsewhere."""
    kind = re.fullmatch(r"([a-z]+)(:\d+)?", name)
    if kind is None or kind[1] not in DEVICES:
        raise ConfigError(f"device: got {name!r}, expected cpu, cuda, cuda:1, ... Try cpu or cuda")


def check_counts(states: int, sequences: int, length: int, held_out: int, multiple_of: int | None) -> None:
    """The numbers of ``compressm compress``.

    Raises:
        ConfigError: one is out of range.
    """
    for name, number, least in (
        ("states", states, 1), ("sequences", sequences, 1), ("length", length, 2), ("held-out", held_out, 1)
    ):  # fmt: skip
        if number < least:
            raise ConfigError(f"--{name}: got {number}, expected {least} or more")
    if multiple_of is not None and states % max(1, multiple_of):
        raise ConfigError(f"--states {states}: expected a multiple of {multiple_of}, as --multiple-of says")
