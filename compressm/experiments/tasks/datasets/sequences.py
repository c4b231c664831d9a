"""Images as sequences of pixels, each of a class."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from compressm.errors import DataError
from compressm.experiments.tasks.parts import Data


@dataclass(frozen=True)
class Sequences(Data):
    """Sequences that each belong to a class.

    Attributes:
        name: for reports.
        train_x, test_x: (n, L, channels) uint8.
        train_y, test_y: (n,) int64.
        classes: number of classes.
    """

    kind: ClassVar[str] = "labelled sequences of pixels"

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    def to(self, device: torch.device) -> Sequences:
        """The same on a device."""
        return replace(self, **{key: getattr(self, key).to(device) for key in ("train_x", "train_y", "test_x", "test_y")})

    def describe(self) -> dict[str, int | str]:
        """For the report."""
        n, length, channels = self.train_x.shape
        sizes = {"train": n, "test": len(self.test_x), "length": length, "channels": channels, "classes": self.classes}
        return {"name": self.name, **sizes}

    def held_out(self) -> Sequences:
        """A sixth of the training sequences, drawn once and for all, stands for the test sequences."""
        order = torch.randperm(len(self.train_y), generator=torch.Generator().manual_seed(0)).to(self.train_y.device)
        count = min(len(self.test_y), len(order) // 6)
        if not count:
            raise DataError(f"{self.name}: {len(order)} training sequences, expected at least 6 to hold some out for tuning")
        out, rest = order[:count], order[count:]
        x, y = self.train_x, self.train_y
        return Sequences(self.name, x[rest], y[rest], x[out], y[out], self.classes)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel of the training pixels, float32."""
        pixels = self.train_x.flatten(0, 1)
        columns = [np.bincount(pixels[:, c].cpu().numpy(), minlength=256) for c in range(pixels.shape[1])]
        counts = torch.from_numpy(np.stack(columns)).double() / len(pixels)
        grey = torch.arange(256, dtype=torch.float64)
        mean = counts @ grey
        variance = counts @ grey.square() - mean.square()
        return mean.float(), variance.clamp_min(1e-12).sqrt().float()
