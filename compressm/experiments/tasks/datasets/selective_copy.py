"""Selective copying: tokens among others that do not count, to be said again in their order at the end."""

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


class SelectiveCopySettings(Settings):
    """A sequence of ``length`` tokens holds ``copied`` out of ``values`` different ones, and ends with as many that ask."""

    copied: int = Field(8, ge=1)
    values: int = Field(8, ge=2)
    length: int = Field(64, ge=2)

    @model_validator(mode="after")
    def _sizes(self) -> SelectiveCopySettings:
        if self.length < 2 * self.copied:
            raise ValueError(f"length = {self.length} must be at least 2 * copied = {2 * self.copied}")
        return self


@dataclass(frozen=True)
class Copies(Drawn):
    """Tokens to be copied at random places.

    The tokens are 0 for nothing, 1 for a question, then the values.  The last ``copied`` are questions; the answer at the first
    of them is the first value of the sequence, and so on.

    Attributes:
        copied, values: see :class:`SelectiveCopySettings`.
    """

    kind: ClassVar[str] = "tokens to be copied"

    copied: int
    values: int

    @property
    def vocabulary(self) -> int:
        return 2 + self.values

    @property
    def asked(self) -> int:
        return self.copied

    def describe(self) -> dict[str, int | str]:
        """For the report."""
        sizes = {"copied": self.copied, "values": self.values, "length": self.length}
        return {"name": self.name, **sizes, "vocabulary": self.vocabulary}

    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.own_seed(seed))
        values = torch.randint(2, self.vocabulary, (count, self.copied), generator=generator)
        places = distinct(count, self.length - self.copied, self.copied, generator).sort(1).values
        tokens = torch.zeros(count, self.length, dtype=torch.int64).scatter_(1, places, values)
        answers = torch.full_like(tokens, NOT_ASKED)
        tokens[:, -self.copied :], answers[:, -self.copied :] = 1, values
        return tokens.to(self.device), answers.to(self.device)


class SelectiveCopy(Dataset):
    """The task that a time-invariant layer cannot do, at a size for minutes (Gu and Dao 2023, arXiv 2312.00752)."""

    name = "selective_copy"
    Settings = SelectiveCopySettings
    settings: SelectiveCopySettings
    gives = Copies
    model = "mamba"
    objective = "answers"
    at_hand = True

    def load(self, folder: Path | None) -> Copies:
        refuse_folder(self.name, folder)
        s = self.settings
        return Copies("selective copying", s.length, torch.device("cpu"), s.copied, s.values)
