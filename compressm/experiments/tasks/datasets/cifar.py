"""Sequential CIFAR-10: 1024 pixels of three channels each."""

from __future__ import annotations

import io
import itertools
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compressm.errors import DataError
from compressm.experiments.tasks.datasets.files import fetch
from compressm.experiments.tasks.datasets.sequences import Sequences
from compressm.experiments.tasks.parts import Dataset
from compressm.inputs import require_folder

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR_FILE = "cifar-10-binary.tar.gz"
CIFAR_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))


class SequentialCifar(Dataset):
    """The official binary version, or a copy as JPEG."""

    name = "scifar"
    gives = Sequences
    model = "lru"
    objective = "classification"
    examples = 50_000

    def load(self, folder: Path | None) -> Sequences:
        require_folder(folder)
        if folder is not None and (Path(folder) / "cifar10-jpeg.npz").is_file():
            return _cifar_jpeg(Path(folder) / "cifar10-jpeg.npz")
        if folder is not None:
            inner = Path(folder) / "cifar-10-batches-bin"
            root = inner if inner.is_dir() else Path(folder)
            parts = {name: _bytes(root / name) for name in (*CIFAR_TRAIN, "test_batch.bin")}
        else:
            with tarfile.open(fetch(CIFAR_URL, CIFAR_FILE, CIFAR_SHA256, "cifar10")) as archive:
                names = (*CIFAR_TRAIN, "test_batch.bin")
                files = {name: archive.extractfile(f"cifar-10-batches-bin/{name}") for name in names}
                parts = {name: file.read() for name, file in files.items() if file is not None}
        train = [_records(name, parts[name]) for name in CIFAR_TRAIN]
        x, y = torch.cat([a for a, _ in train]), torch.cat([b for _, b in train])
        return Sequences("CIFAR-10", x, y, *_records("test_batch.bin", parts["test_batch.bin"]), 10)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        expected = "cifar10-jpeg.npz, or data_batch_1..5.bin and test_batch.bin of the official binary version"
        raise DataError(f"{path}: {error.strerror}, expected {expected}. Omit --data-dir to download them") from error


def _records(name: str, data: bytes) -> tuple[Tensor, Tensor]:
    if not data or len(data) % 3073:
        raise DataError(f"{name}: {len(data)} bytes, expected a multiple of 3073 (label and 3 x 1024 pixels). Fetch it again")
    rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 1024).transpose(1, 2).contiguous(), rows[:, 0].long()


def _cifar_jpeg(path: Path) -> Sequences:
    from PIL import Image

    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            data = {key: file[key] for key in file.files if key != "class_names"}
        parts = {}
        for split in ("train", "test"):
            offsets, packed = data[f"{split}_offsets"], data[f"{split}_jpeg"].tobytes()
            slices = (packed[a:b] for a, b in itertools.pairwise(offsets))
            pixels = np.stack([np.asarray(Image.open(io.BytesIO(s)).convert("RGB")) for s in slices])
            parts[f"{split}_x"] = torch.from_numpy(pixels).reshape(-1, 1024, 3)
            parts[f"{split}_y"] = torch.from_numpy(data[f"{split}_labels"]).long()
    except (OSError, ValueError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: damaged or incomplete ({error}), expected CIFAR-10 as JPEG. Fetch it again") from error
    return Sequences("CIFAR-10 (lossy JPEG copy)", **parts, classes=10)
