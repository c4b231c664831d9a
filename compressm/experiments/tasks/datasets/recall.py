"""Associative recall: pairs of keys and values, then the keys again, of which each asks for its value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compressm.experiments.tasks.datasets.drawn import NOT_ASKED, Drawn, distinct, refuse_folder
from compressm.experiments.tasks.parts import Dataset
from compressm.experiments.tasks.settings import Settings


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
class Associations(Drawn):
    """Keys that are asked for.

    The tokens are 0 for nothing, then the keys, then the values.  Behind the pairs every key comes once more, at places that
    are drawn as well; its value is the answer there.

    Attributes:
        pairs, keys, values: see :class:`RecallSettings`.
    """

    kind: ClassVar[str] = "pairs of keys and values"

    pairs: int
    keys: int
    values: int

    @property
    def vocabulary(self) -> int:
        return 1 + self.keys + self.values

    @property
    def asked(self) -> int:
        return self.pairs

    def describe(self) -> dict[str, int | str]:
        """For the report."""
        sizes = {"pairs": self.pairs, "keys": self.keys, "values": self.values, "length": self.length}
        return {"name": self.name, **sizes, "vocabulary": self.vocabulary}

    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.own_seed(seed))
        keys = 1 + distinct(count, self.keys, self.pairs, generator)
        values = torch.randint(1 + self.keys, self.vocabulary, (count, self.pairs), generator=generator)
        told = 2 * self.pairs
        places = told + distinct(count, self.length - told, self.pairs, generator)
        tokens = torch.zeros(count, self.length, dtype=torch.int64)
        tokens[:, 0:told:2], tokens[:, 1:told:2] = keys, values
        answers = torch.full_like(tokens, NOT_ASKED).scatter_(1, places, values)
        return tokens.scatter_(1, places, keys).to(self.device), answers.to(self.device)


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
        refuse_folder(self.name, folder)
        s = self.settings
        return Associations("associative recall", s.length, torch.device("cpu"), s.pairs, s.keys, s.values)
