"""Which examples and which random numbers a training step sees: functions of the seed and the step alone.

A run that is interrupted and resumed therefore goes on exactly as if nothing had happened, and runs of one seed share their
batches and dropout masks.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from compressm.experiments.declared import too_large
from compressm.experiments.tasks.datasets.drawn import Drawn
from compressm.experiments.tasks.datasets.texts import Text, cut_windows

SEEDS_PER_BLOCK = 1024
ORDER, NOISE, CALIBRATION, HELD_OUT = range(4)  # independent streams of random numbers


def stream(seed: int, *place: int) -> int:
    """A 32-bit seed for one place in a run, statistically independent of all others (numpy's SeedSequence)."""
    return int(np.random.SeedSequence([seed, *place]).generate_state(1)[0])


def step_seed(seed: int, step: int) -> int:
    """The 32-bit seed of what a training step draws, found in little time."""
    block, position = divmod(step, SEEDS_PER_BLOCK)
    return _step_seeds(seed, block)[position]


@functools.lru_cache(maxsize=4)
def _step_seeds(seed: int, block: int) -> list[int]:
    return np.random.SeedSequence([seed, NOISE, block]).generate_state(SEEDS_PER_BLOCK).tolist()


class Batches:
    """Shuffled batches without end; the incomplete one at the end of an epoch is left out.

    Args:
        x: (n, L, channels); y: (n,) labels.
        batch_size: at most n.
        seed: of the order.

    Raises:
        ConfigError: fewer examples than one batch takes.
    """

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, seed: int) -> None:
        if batch_size > len(y):
            raise too_large(batch_size, len(y))
        self.x, self.y, self.batch_size, self.seed = x, y, batch_size, seed
        self._epoch, self._order, self._labels = -1, torch.empty(0), torch.empty(0)  # of the present epoch

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels of a step, counted from 0."""
        epoch, position = divmod(step, len(self.y) // self.batch_size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(stream(self.seed, ORDER, epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.y), generator=generator).to(self.y.device)
            self._labels = self.y[self._order]
        part = slice(position * self.batch_size, (position + 1) * self.batch_size)
        return self.x.index_select(0, self._order[part]), self._labels[part]

    def calibration(self, sequences: int) -> list[Tensor]:
        """Batches of training inputs for data Gramians, the same at every call."""
        generator = torch.Generator().manual_seed(stream(self.seed, CALIBRATION))
        chosen = torch.randperm(len(self.y), generator=generator)[:sequences].to(self.y.device)
        return [self.x[part] for part in chosen.split(self.batch_size)]


class WindowBatches:
    """Random windows of the training part, a function of the seed and the step alone.

    Args:
        text: whose training part is used.
        length: bytes that are predicted in each window.
        batch_size: windows per step.
        seed: of the draws.

    Raises:
        DataError: the part is shorter than one window.
    """

    def __init__(self, text: Text, length: int, batch_size: int, seed: int) -> None:
        text.require("train", length)
        self.part, self.length, self.batch_size, self.seed = text.splits["train"], length, batch_size, seed

    def __getitem__(self, step: int) -> tuple[Tensor]:
        """(batch_size, length + 1) uint8 of a step, counted from 0."""
        return (self._draw(self.batch_size, stream(self.seed, ORDER, step)),)

    def calibration(self, sequences: int) -> list[Tensor]:
        """Batches of inputs (at most batch_size, length) for data Gramians, the same at every call."""
        return list(self._draw(sequences, stream(self.seed, CALIBRATION))[:, :-1].split(self.batch_size))

    def _draw(self, count: int, seed: int) -> Tensor:
        starts = torch.randint(len(self.part) - self.length, (count,), generator=torch.Generator().manual_seed(seed))
        return cut_windows(self.part, starts.to(self.part.device), self.length)


class DrawnBatches:
    """Examples that are drawn anew for every step, a function of the seed and the step alone.

    Args:
        data: where they come from.
        batch_size: examples per step.
        seed: of the draws.
    """

    def __init__(self, data: Drawn, batch_size: int, seed: int) -> None:
        self.data, self.batch_size, self.seed = data, batch_size, seed

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and answers (batch_size, L) of a step, counted from 0."""
        return self.data.draw(self.batch_size, stream(self.seed, ORDER, step))

    def calibration(self, sequences: int) -> list[Tensor]:
        """Batches of inputs (at most batch_size, L) for data Gramians, the same at every call."""
        inputs, _answers = self.data.draw(sequences, stream(self.seed, CALIBRATION))
        return list(inputs.split(self.batch_size))
