"""ListOps: nested lists of digits, such as [MAX 2 [SM 7 5] 1], whose value is asked for at the end."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compressm.experiments.tasks.datasets.drawn import NOT_ASKED, Drawn, refuse_folder
from compressm.experiments.tasks.parts import Dataset
from compressm.experiments.tasks.settings import Settings

DIGITS, OPERATORS = 10, ("MIN", "MAX", "MED", "SM")  # tokens: 0 for nothing, the digits from 1 on, the operators, the bracket
FIRST_OPERATOR = 1 + DIGITS
CLOSE = FIRST_OPERATOR + len(OPERATORS)
LIST = 0.25  # how often an entry is a list, as in the Long Range Arena


class ListOpsSettings(Settings):
    """Sequences have ``shortest`` to ``length`` tokens; lists are nested at most ``depth`` deep and have 2 to ``entries``
    entries.
    """

    length: int = Field(40, ge=4)
    shortest: int = Field(10, ge=4)
    depth: int = Field(4, ge=1)
    entries: int = Field(5, ge=2)

    @model_validator(mode="after")
    def _sizes(self) -> ListOpsSettings:
        longest = 1
        for _ in range(self.depth):
            longest = min(2 + self.entries * longest, self.length)
        if not self.shortest <= longest:
            expected = f"at most {longest}, the length of the longest lists of this length, depth and entries"
            raise ValueError(f"shortest = {self.shortest} must be {expected}")
        return self


@dataclass(frozen=True)
class Lists(Drawn):
    """Nested lists, shorter ones behind nothing; the answer, at their last bracket, is the digit's token.

    Attributes:
        shortest, depth, entries: see :class:`ListOpsSettings`.
    """

    kind: ClassVar[str] = "nested lists of digits"

    shortest: int
    depth: int
    entries: int

    @property
    def vocabulary(self) -> int:
        return CLOSE + 1

    @property
    def asked(self) -> int:
        return 1

    def describe(self) -> dict[str, int | str]:
        """For the report."""
        sizes = {"length": self.length, "shortest": self.shortest, "depth": self.depth, "entries": self.entries}
        return {"name": self.name, **sizes, "vocabulary": self.vocabulary}

    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        chance = random.Random(self.own_seed(seed))
        tokens = torch.zeros(count, self.length, dtype=torch.int64)
        answers = torch.full_like(tokens, NOT_ASKED)
        for row in range(count):
            written: list[int] = []
            while not self.shortest <= len(written) <= self.length:
                written, value = entry(chance, self.depth, self.entries, inner=False)
            tokens[row, -len(written) :] = torch.tensor(written)
            answers[row, -1] = 1 + value
        return tokens.to(self.device), answers.to(self.device)


def entry(chance: random.Random, depth: int, entries: int, *, inner: bool = True) -> tuple[list[int], int]:
    """An entry of a list in tokens, and its value: a digit, or if ``depth`` allows, and is the outermost, another list."""
    if depth == 0 or (inner and chance.random() > LIST):
        digit = chance.randrange(DIGITS)
        return [1 + digit], digit
    parts = [entry(chance, depth - 1, entries) for _ in range(chance.randint(2, entries))]
    operator = chance.randrange(len(OPERATORS))
    written = [FIRST_OPERATOR + operator, *(token for tokens, _ in parts for token in tokens), CLOSE]
    return written, value_of(operator, [value for _, value in parts])


def value_of(operator: int, values: list[int]) -> int:
    """Of a list: the least, the largest, the median, rounded down, or the last digit of the sum."""
    ordered, middle = sorted(values), len(values) // 2
    median = ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) // 2
    return (ordered[0], ordered[-1], median, sum(values) % DIGITS)[operator]


class ListOps(Dataset):
    """ListOps with the grammar of the Long Range Arena (Tay et al. 2020, arXiv 2011.04006), at sizes for minutes.

    The sequences are our own: a generator that follows from the run's seed draws them without end.  The Arena's were drawn
    without a seed; they have 500 to 2000 tokens, lists 10 deep with up to 10 entries, and results are not comparable.
    """

    name = "listops"
    Settings = ListOpsSettings
    settings: ListOpsSettings
    gives = Lists
    model = "mamba"
    objective = "answers"
    at_hand = True

    def load(self, folder: Path | None) -> Lists:
        refuse_folder(self.name, folder)
        s = self.settings
        return Lists("ListOps, drawn by a generator of our own", s.length, torch.device("cpu"), s.shortest, s.depth, s.entries)
