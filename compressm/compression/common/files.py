"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compressm.errors import CheckpointError

if sys.platform == "win32":  # no file locks: leftovers of killed writers stay
    fcntl = None
else:
    import fcntl


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the target, flush to disk and rename: at every moment the target is the old file or the new one.

    A symbolic link stays one, its target is replaced.  What killed writers left (``.name.*.tmp``) is removed; a living writer
    holds a lock on its file.

    Raises:
        OSError: the target is as it was.
    """
    path = Path(os.path.realpath(path))
    _remove_leftovers(path)
    with _temporary(path) as (descriptor, temporary):
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def flush_folder(path: Path) -> None:
    """Make a renaming last through a power cut.

    Raises:
        OSError: it may not.
    """
    folder = os.open(Path(os.path.realpath(path)).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def about(path: str | Path) -> Iterator[None]:
    """Say in errors which file they are about."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__


def _prefix(path: Path) -> str:
    return f".{path.name[:200]}."


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[int, str]]:
    """A new locked file beside ``path``: descriptor and name; removed at the end if it still has that name."""
    while True:
        name = str(path.parent / f"{_prefix(path)}{secrets.token_hex(8)}.tmp")
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            if not _lock(descriptor) or not os.path.exists(name):
                continue  # another writer took it for a leftover between these lines
            yield descriptor, name
            return
        finally:
            Path(name).unlink(missing_ok=True)
            os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    if fcntl is None:
        return
    with os.scandir(path.parent) as entries:
        names = [entry.path for entry in entries if entry.name.startswith(_prefix(path)) and entry.name.endswith(".tmp")]
    for name in names:
        try:
            descriptor = os.open(name, os.O_WRONLY)
        except OSError:
            continue  # its writer has just finished, or it belongs to someone else
        try:
            if _lock(descriptor):
                Path(name).unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Take the lock that its holder's death releases; False if another process has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
