"""The source of Python's standard library as bytes to predict."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import ClassVar

import torch
from torch import Tensor

from compressm.errors import DataError
from compressm.experiments.tasks.datasets.tokens import Tokens
from compressm.experiments.tasks.parts import Dataset

BYTES = 256
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
SPLITS = {"train": 0.90, "validation": 0.95, "test": 1.0}  # upper ends of the ranges of a file's hash
SEPARATOR = b"\0"  # between two files


@dataclass(frozen=True)
class Text(Tokens):
    """Bytes in three parts that share no file.

    Attributes:
        name: for reports.
        splits: ``"train"``, ``"validation"`` and ``"test"``, each (bytes,) uint8.
        files: how many there are in all.
        sha256: of the three parts one after the other.
        python: version whose source it is; empty for other text.
    """

    kind: ClassVar[str] = "bytes of text"

    name: str
    splits: dict[str, Tensor]
    files: int
    sha256: str
    python: str = ""

    @property
    def vocabulary(self) -> int:
        return BYTES

    def to(self, device: torch.device) -> Text:
        """The same on a device."""
        return replace(self, splits={name: part.to(device) for name, part in self.splits.items()})

    def describe(self) -> dict[str, int | str]:
        """For the report; sizes in bytes."""
        sizes = {name: len(part) for name, part in self.splits.items()}
        version = {"python": self.python} if self.python else {}
        return {"name": self.name, **version, "files": self.files, **sizes, "sha256": self.sha256}

    def held_out(self) -> Text:
        """The validation part stands for the test part."""
        return replace(self, splits={**self.splits, "test": self.splits["validation"]})

    def windows(self, split: str, length: int, limit: int) -> Tensor:
        """Windows for measuring, evenly spaced over a part and overlapping in no predicted byte.

        Args:
            split: which part.
            length: bytes that are predicted in each.
            limit: on the bytes that are predicted in all; one window at least.

        Returns:
            (n, length + 1) uint8: each byte but the first is to be predicted from those before it in its window.

        Raises:
            DataError: the part is shorter than one window.
        """
        self.require(split, length)
        part = self.splits[split]
        available = (len(part) - 1) // length
        count = min(available, max(1, limit // length))
        starts = torch.arange(count, device=part.device) * ((len(part) - 1) // count)
        return cut_windows(part, starts, length)

    def require(self, split: str, length: int) -> None:
        """Raise DataError if a part is shorter than one window."""
        part = self.splits[split]
        if len(part) <= length:
            raise DataError(
                f"{self.name}: its {split} part has {len(part)} bytes, expected at least length + 1 = {length + 1}. "
                "Use a folder with more files (each goes to one part by a hash of its path) or a smaller length"
            )


def cut_windows(part: Tensor, starts: Tensor, length: int) -> Tensor:
    """(n, length + 1) uint8, from the positions ``starts`` (n,) on."""
    return part.unfold(0, length + 1, 1)[starts]


class StandardLibrary(Dataset):
    """Every .py file of Python's standard library, or of a folder, without tests and installed packages."""

    name = "stdlib"
    gives = Text
    model = "mamba"
    objective = "next_byte"
    at_hand = True

    def load(self, folder: Path | None) -> Text:
        return load_text(folder)


def load_text(folder: Path | None) -> Text:
    """Every .py file of Python's standard library, or of a folder, without tests and installed packages.

    Raises:
        DataError: no such folder, no files, or a file that cannot be read.
    """
    library = folder is None
    root = Path(sysconfig.get_paths()["stdlib"] if folder is None else folder)
    if not root.is_dir():
        missing = "this Python has no standard library as files. Pass --data-dir with a folder of .py files" if library else (
            f"--data-dir {root}: no such folder, expected one with .py files. Omit it to use Python's standard library"
        )  # fmt: skip
        raise DataError(missing)
    files = _files(root)
    if not files:
        remedy = "Pass --data-dir with a folder of .py files" if library else "Omit it to use Python's standard library"
        raise DataError(f"{root}: found no .py file (a stripped or zipped library has none), expected some. {remedy}")
    parts: dict[str, list[bytes]] = {name: [] for name in SPLITS}
    for relative in files:
        try:
            parts[split_of(relative)].append((root / relative).read_bytes())
        except OSError as error:
            raise DataError(f"{root / relative}: {error.strerror}, expected a file that can be read") from error
    joined = {name: SEPARATOR.join(contents) for name, contents in parts.items()}
    digest = hashlib.sha256(b"".join(joined.values())).hexdigest()
    version = platform.python_version() if library else ""
    name = f"standard library of Python {version}" if library else f"Python files of {root}"
    return Text(name, {part: _tensor(content) for part, content in joined.items()}, len(files), digest, version)


def split_of(path: PurePosixPath | Path) -> str:
    """The part that a file belongs to, by its path alone: 90 % train, 5 % validation, 5 % test."""
    place = int.from_bytes(hashlib.sha256(path.as_posix().encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64
    return next((name for name, end in SPLITS.items() if place < end), "test")


def _files(root: Path) -> list[PurePosixPath]:
    """Relative paths in their sorted order."""
    found: Iterable[Path] = (path.relative_to(root) for path in root.rglob("*.py") if path.is_file())
    return sorted(PurePosixPath(path.as_posix()) for path in found if not SKIPPED & set(path.parts[:-1]))


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
