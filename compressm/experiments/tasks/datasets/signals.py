"""Input and output signals, and the system identification task that is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compressm.errors import DataError
from compressm.experiments.tasks.datasets.drawn import refuse_folder
from compressm.experiments.tasks.parts import Data, Dataset
from compressm.experiments.tasks.settings import Settings
from compressm.layers import LRU

BURN_IN = 64  # sequences that the scale of the outputs is taken from
SEED = 1000  # of a true system, beside that of a model


@dataclass(frozen=True)
class Signals(Data):
    """Pairs of an input and an output signal.

    Attributes:
        name: for reports.
        train_x, test_x: (n, L, inputs) float32.
        train_y, test_y: (n, L, outputs) float32; those for testing without noise, of variance about one.
    """

    kind: ClassVar[str] = "pairs of signals"

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def to(self, device: torch.device) -> Signals:
        """The same on a device."""
        return replace(self, **{key: tensor.to(device) for key, tensor in vars(self).items() if key != "name"})

    def describe(self) -> dict[str, int | str]:
        """For the report."""
        n, length, inputs = self.train_x.shape
        sizes = {"train": n, "test": len(self.test_x), "length": length, "inputs": inputs, "outputs": self.train_y.shape[-1]}
        return {"name": self.name, **sizes}

    def held_out(self) -> Signals:
        """The last sixth of the training pairs, with their noise, stands for the test pairs."""
        count = min(len(self.test_x), len(self.train_x) // 6)
        if not count:
            raise DataError(f"{self.name}: {len(self.train_x)} training pairs, expected at least 6 to hold some out for tuning")
        rest = len(self.train_x) - count
        x, y = self.train_x, self.train_y
        return replace(self, train_x=x[:rest], train_y=y[:rest], test_x=x[rest:], test_y=y[rest:])


class SystemSettings(Settings):
    """A true system of ``true_order`` complex modes on the ring ``true_r_min`` to ``true_r_max`` with ``channels`` inputs and
    as many outputs, white input, and noise of standard deviation ``noise`` on outputs of unit variance; ``sequences`` pairs
    of ``length`` steps to train on.
    """

    true_order: int = Field(8, ge=1)
    true_r_min: float = Field(0.9, ge=0, lt=1)
    true_r_max: float = Field(0.99, gt=0, lt=1)
    channels: int = Field(4, ge=1)
    noise: float = Field(0.05, ge=0)
    sequences: int = Field(4096, ge=1)
    length: int = Field(256, ge=1)


class SystemIdentification(Dataset):
    """Which linear system makes the outputs from the inputs; every seed has a system of its own."""

    name = "sysid"
    Settings = SystemSettings
    settings: SystemSettings
    gives = Signals
    model = "lru_system"
    objective = "regression"
    at_hand = True

    def load(self, folder: Path | None) -> Signals:
        s = self.settings
        refuse_folder(self.name, folder)
        random = torch.Generator().manual_seed(SEED + s.seed)
        truth = true_system(s, random)
        name = f"white noise through a system of order {s.true_order}"
        return white_pairs(name, truth, random, s.sequences, s.length, s.channels, s.noise)


def true_system(settings: SystemSettings, random: torch.Generator) -> LRU:
    """A system without direct feed-through, drawn as LRUs are initialised, phases from 0 to pi."""
    s = settings
    truth = LRU(s.channels, s.true_order, r_min=s.true_r_min, r_max=s.true_r_max, max_phase=math.pi).requires_grad_(False)
    ring, angle = (torch.rand(s.true_order, generator=random) for _ in range(2))
    nu = -0.5 * (ring * (s.true_r_max**2 - s.true_r_min**2) + s.true_r_min**2).log()
    truth.nu_log.copy_(nu.log())
    truth.theta_log.copy_((math.pi * angle).clamp_min(1e-6).log())
    truth.gamma_log.copy_(0.5 * torch.log(-torch.expm1(-2 * nu)))
    for weight in (truth.B_re, truth.B_im, truth.C_re, truth.C_im):
        weight.copy_(torch.randn(weight.shape, generator=random))
    truth.D.zero_()
    return truth


def white_pairs(
    name: str,
    system: Callable[[Tensor], Tensor],
    random: torch.Generator,
    sequences: int,
    length: int,
    channels: int,
    noise: float,
    *,
    alike: bool = False,
) -> Signals:
    """White inputs (n, L, channels) and what a system makes of them, scaled to variance one: of all outputs together, or, where
    they are to be ``alike``, of each.  Outputs for training have white noise of a standard deviation ``noise``.
    """

    def white(count: int) -> Tensor:
        return torch.randn(count, length, channels, generator=random)

    scale = 1 / system(white(BURN_IN)).std((0, 1) if alike else None)

    def pairs(count: int) -> tuple[Tensor, Tensor]:
        x = white(count)
        return x, scale * system(x)

    (test_x, test_y), (x, y) = pairs(64), pairs(sequences)
    y += noise * torch.randn(y.shape, generator=random)
    return Signals(name, x, y, test_x, test_y)
