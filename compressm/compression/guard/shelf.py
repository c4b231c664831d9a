"""Tensors put aside on disk."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compressm.compression.common.codec import to_storable
from compressm.errors import CheckpointError

FILE_BYTES = 1 << 30  # written at a time, so that a GPU's tensors need no more CPU memory than this


class Shelf(Mapping[str, Tensor]):
    """A read-only mapping of names to CPU tensors in safetensors files, which are deleted with it.

    Args:
        tensors: what to store; on any device.
        folder: where a temporary folder is made; None: the system's.

    Raises:
        CheckpointError: they cannot be written.
    """

    def __init__(self, tensors: Mapping[str, Tensor], folder: str | Path | None = None) -> None:
        self._files: dict[str, Any] = {}
        self._complex: set[str] = set()
        try:
            self.path = Path(tempfile.mkdtemp(prefix="compressm-", dir=folder))
            self._remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
            part: dict[str, Tensor] = {}
            size = 0
            for name, tensor in tensors.items():
                if part and size + tensor.nbytes > FILE_BYTES:
                    self._write(part)
                    part, size = {}, 0
                part[name] = tensor
                size += tensor.nbytes
            self._write(part)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"snapshot: cannot be written to {folder or tempfile.gettempdir()} ({error}). Free space there, or choose "
                "another folder or a larger disk_bytes in Rollback"
            ) from error

    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        storable, complex_names = to_storable(tensors)
        self._complex.update(complex_names)
        path = self.path / f"{len(self._files)}.safetensors"
        save_file(storable, path)
        file = safe_open(path, framework="pt")
        self._files |= dict.fromkeys(storable, file)

    def __getitem__(self, name: str) -> Tensor:
        value = self._files[name].get_tensor(name)
        return torch.view_as_complex(value) if name in self._complex else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def close(self) -> None:
        """Delete the files."""
        self._files.clear()
        self._remove()
