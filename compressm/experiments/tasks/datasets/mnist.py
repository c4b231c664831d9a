"""Sequential MNIST: 784 pixels each, or 196."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compressm.errors import DataError
from compressm.experiments.tasks.datasets.files import fetch
from compressm.experiments.tasks.datasets.sequences import Sequences
from compressm.experiments.tasks.parts import Dataset
from compressm.inputs import require_folder

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}


class SequentialMnist(Dataset):
    """The four official files."""

    name = "smnist"
    gives = Sequences
    model = "lru"
    objective = "classification"
    examples = 60_000

    def load(self, folder: Path | None) -> Sequences:
        require_folder(folder)
        parts = []
        for file, digest in MNIST_FILES.items():
            path = Path(folder) / file if folder is not None else fetch(MNIST_URL, file, digest, "mnist")
            values = read_idx(path)
            parts.append(torch.from_numpy(values))
        images, labels, test_images, test_labels = parts
        for x, y, what in ((images, labels, "train"), (test_images, test_labels, "t10k")):
            if x.dim() != 3 or y.dim() != 1 or len(x) != len(y) or len(x) == 0:
                got = f"images {tuple(x.shape)} and labels {tuple(y.shape)}"
                raise DataError(f"MNIST {what} files: got {got}, expected n images and n labels. Fetch them again")
        flat = [x.flatten(1)[:, :, None] for x in (images, test_images)]
        return Sequences("MNIST", flat[0], labels.long(), flat[1], test_labels.long(), 10)


class PooledMnist(SequentialMnist):
    """The same images with a quarter of the pixels: the mean of every square of four, 196 each."""

    name = "mnist14"
    examples = 60_000

    def load(self, folder: Path | None) -> Sequences:
        full = super().load(folder)
        return replace(full, name="MNIST, 14 x 14 pixels", train_x=pooled(full.train_x), test_x=pooled(full.test_x))


def pooled(x: Tensor) -> Tensor:
    """Images (n, side^2, 1) uint8 with half the side, which is even; rounded to the nearest, halves to even."""
    n, side = len(x), math.isqrt(x.shape[1])
    squares = x.view(n, side // 2, 2, side // 2, 2).to(torch.float32)
    return squares.mean((2, 4)).round().to(torch.uint8).view(n, -1, 1)


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
