"""Images as sequences of pixels."""

from __future__ import annotations

import gzip
import io
import itertools
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compressm.errors import DataError

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR_FILE = "cifar-10-binary.tar.gz"
CIFAR_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))


@dataclass(frozen=True)
class Dataset:
    """A classification task on sequences.

    Attributes:
        name: for reports.
        train_x, test_x: (n, L, channels) uint8.
        train_y, test_y: (n,) int64.
        classes: number of classes.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    def to(self, device: torch.device) -> Dataset:
        """The same on a device."""
        moved = (t.to(device) for t in (self.train_x, self.train_y, self.test_x, self.test_y))
        return Dataset(self.name, *moved, self.classes)

    def describe(self) -> dict[str, int | str]:
        """For the report."""
        n, length, channels = self.train_x.shape
        sizes = {"train": n, "test": len(self.test_x), "length": length, "channels": channels, "classes": self.classes}
        return {"name": self.name, **sizes}

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel of the training pixels, float32."""
        pixels = self.train_x.flatten(0, 1)
        columns = [np.bincount(pixels[:, c].cpu().numpy(), minlength=256) for c in range(pixels.shape[1])]
        counts = torch.from_numpy(np.stack(columns)).double() / len(pixels)
        grey = torch.arange(256, dtype=torch.float64)
        mean = counts @ grey
        variance = counts @ grey.square() - mean.square()
        return mean.float(), variance.clamp_min(1e-12).sqrt().float()


def load(name: str, folder: Path | None) -> Dataset:
    """Load ``digits``, ``smnist`` or ``scifar``.

    Args:
        name: which.
        folder: where the files are; None downloads them (checked by SHA-256, cached).

    Raises:
        DataError: missing, incomplete or damaged files, or a failed download.
    """
    if folder is not None and not Path(folder).is_dir():
        raise DataError(f"--data-dir {folder}: no such folder, expected one with the dataset's files. Omit it to download them")
    return {"digits": _digits, "smnist": _smnist, "scifar": _scifar}[name](folder)


def _digits(folder: Path | None) -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy((images * 15.9375).round().astype(np.uint8))[:, :, None]
    y = torch.from_numpy(labels.astype(np.int64))
    train, test = train_test_split(np.arange(len(y)), test_size=450, random_state=0, stratify=labels)
    return Dataset("handwritten digits (scikit-learn)", x[train], y[train], x[test], y[test], 10)


def _smnist(folder: Path | None) -> Dataset:
    parts = []
    for file, digest in MNIST_FILES.items():
        path = Path(folder) / file if folder is not None else _fetch(MNIST_URL, file, digest, "mnist")
        values = read_idx(path)
        parts.append(torch.from_numpy(values))
    images, labels, test_images, test_labels = parts
    for x, y, what in ((images, labels, "train"), (test_images, test_labels, "t10k")):
        if x.dim() != 3 or y.dim() != 1 or len(x) != len(y) or len(x) == 0:
            got = f"images {tuple(x.shape)} and labels {tuple(y.shape)}"
            raise DataError(f"MNIST {what} files: got {got}, expected n images and n labels. Fetch them again")
    flat = [x.flatten(1)[:, :, None] for x in (images, test_images)]
    return Dataset("MNIST", flat[0], labels.long(), flat[1], test_labels.long(), 10)


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes.

    Raises:
        DataError: missing, truncated, or not such a file.
    """
    try:
        with gzip.open(path) as file:
            data = file.read()
    except FileNotFoundError as error:
        expected = ", ".join(MNIST_FILES)
        raise DataError(f"{path}: no such file, expected the official {expected}. Omit --data-dir to download them") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged or truncated ({error}), expected a complete IDX .gz file. Fetch it again") from error
    rank = data[3] if len(data) >= 4 and data[:3] == b"\0\0\x08" else 0
    shape = tuple(np.frombuffer(data, ">u4", rank, 4).tolist()) if rank and len(data) >= 4 + 4 * rank else ()
    if not shape or len(data) - 4 - 4 * rank != int(np.prod(shape, dtype=np.int64)):
        raise DataError(f"{path}: {len(data)} bytes are not an IDX file of unsigned bytes with shape {shape}. Fetch it again")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()


def _scifar(folder: Path | None) -> Dataset:
    if folder is not None and (Path(folder) / "cifar10-jpeg.npz").is_file():
        return _cifar_jpeg(Path(folder) / "cifar10-jpeg.npz")
    if folder is not None:
        inner = Path(folder) / "cifar-10-batches-bin"
        root = inner if inner.is_dir() else Path(folder)
        parts = {name: _bytes(root / name) for name in (*CIFAR_TRAIN, "test_batch.bin")}
    else:
        with tarfile.open(_fetch(CIFAR_URL, CIFAR_FILE, CIFAR_SHA256, "cifar10")) as archive:
            names = (*CIFAR_TRAIN, "test_batch.bin")
            parts = {name: archive.extractfile(f"cifar-10-batches-bin/{name}").read() for name in names}
    train = [_records(name, parts[name]) for name in CIFAR_TRAIN]
    x, y = torch.cat([a for a, _ in train]), torch.cat([b for _, b in train])
    return Dataset("CIFAR-10", x, y, *_records("test_batch.bin", parts["test_batch.bin"]), 10)


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


def _cifar_jpeg(path: Path) -> Dataset:
    from PIL import Image

    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            data = {key: file[key] for key in file.files if key != "class_names"}
        parts = []
        for split in ("train", "test"):
            offsets, packed = data[f"{split}_offsets"], data[f"{split}_jpeg"].tobytes()
            slices = (packed[a:b] for a, b in itertools.pairwise(offsets))
            pixels = np.stack([np.asarray(Image.open(io.BytesIO(s)).convert("RGB")) for s in slices])
            parts += [torch.from_numpy(pixels).reshape(-1, 1024, 3), torch.from_numpy(data[f"{split}_labels"]).long()]
    except (OSError, ValueError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: damaged or incomplete ({error}), expected CIFAR-10 as JPEG. Fetch it again") from error
    return Dataset("CIFAR-10 (lossy JPEG copy)", *parts, 10)


def _fetch(url: str, file: str, sha256: str, folder: str) -> Path:
    import pooch

    try:
        return Path(pooch.retrieve(url + file, f"sha256:{sha256}", fname=file, path=pooch.os_cache("compressm") / folder))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{url}{file}: download failed ({error}). Nothing incomplete was kept: try again, or pass --data-dir with the files"
        ) from error
