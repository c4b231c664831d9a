"""Associative recall: pairs of keys and values, then the keys again, of which each asks for its value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compressm.errors import DataError
from compressm.experiments.tasks.datasets.tokens import Tokens
from compressm.experiments.tasks.parts import Dataset
from compressm.experiments.tasks.settings import Settings

NOT_ASKED = -100  # in the place of an answer: the target that a cross-entropy ignores
STREAM = 0x9E3779B1  # odd and large: seeds of two streams do not meet


class RecallSettings(Settings):
    """A sequence of ``length`` tokens begins with ``pairs`` pairs of different keys, out of ``keys``, and values out of
    ``values``.
    """

    pairs: int = Field(12, ge=1)
    keys: int = Field(31, ge=1)
    values: int = Field(32, ge=2)
    length: int = Field(40, ge=1)

    @model_validator(mode="after")
    def _sizes(self) -> RecallSettings:
        if self.keys < self.pairs:
            raise ValueError(f"keys = {self.keys} must be at least pairs = {self.pairs}: the keys of a sequence differ")
        if self.length < 3 * self.pairs:
            raise ValueError(f"length = {self.length} must be at least 3 * pairs = {3 * self.pairs}: pairs, then each key")
        return self


@dataclass(frozen=True)
class Associations(Tokens):
    """Sequences without end, drawn when they are asked for.

    The tokens are 0 for nothing, then the keys, then the values.  Behind the pairs every key comes once more, at places that
    are drawn as well; its value is the answer there.

    Attributes:
        name: for reports.
        pairs, keys, values, length: see :class:`RecallSettings`.
        device: of what is drawn.
        stream: sequences of different streams have nothing in common, whatever their seeds.
    """

    kind: ClassVar[str] = "pairs of keys and values"

    name: str
    pairs: int
    keys: int
    values: int
    length: int
    device: torch.device
    stream: int = 0

    @property
    def vocabulary(self) -> int:
        return 1 + self.keys + self.values

    def to(self, device: torch.device) -> Associations:
        """The same on a device."""
        return replace(self, device=device)

    def describe(self) -> dict[str, int | str]:
        """For the report."""
        sizes = {"pairs": self.pairs, "keys": self.keys, "values": self.values, "length": self.length}
        return {"name": self.name, **sizes, "vocabulary": self.vocabulary}

    def held_out(self) -> Associations:
        """Other sequences throughout, as there is no end of them."""
        return replace(self, stream=1)

    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """The sequences of a seed.

        Returns:
            tokens (count, length) int64, and the answer at every position, likewise: the value of the key that is asked for
            there, or ``NOT_ASKED``.
        """
        generator = torch.Generator().manual_seed((seed + self.stream * STREAM) % 2**32)  # of which it takes 32 bits
        keys = 1 + _distinct(count, self.keys, self.pairs, generator)
        values = torch.randint(1 + self.keys, self.vocabulary, (count, self.pairs), generator=generator)
        told = 2 * self.pairs
        places = told + _distinct(count, self.length - told, self.pairs, generator)
        tokens = torch.zeros(count, self.length, dtype=torch.int64)
        tokens[:, 0:told:2], tokens[:, 1:told:2] = keys, values
        answers = torch.full_like(tokens, NOT_ASKED).scatter_(1, places, values)
        return tokens.scatter_(1, places, keys).to(self.device), answers.to(self.device)


def _distinct(count: int, numbers: int, chosen: int, generator: torch.Generator) -> Tensor:
    """(count, chosen) different numbers below ``numbers`` in each row, in random order."""
    return torch.rand(count, numbers, generator=generator).argsort(1)[:, :chosen]


class Recall(Dataset):
    """Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): how much the state of a model remembers."""

    name = "recall"
    Settings = RecallSettings
    settings: RecallSettings
    gives = Associations
    model = "mamba2"
    objective = "answers"
    at_hand = True

    def load(self, folder: Path | None) -> Associations:
        if folder is not None:
            raise DataError(f"--data-dir {folder}: expected no folder, as {self.name!r} is drawn at random. Leave it out")
        s = self.settings
        return Associations("associative recall", s.pairs, s.keys, s.values, s.length, torch.device("cpu"))
