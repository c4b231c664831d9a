"""Sequences of tokens without end, some places of which have an answer."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor

from compressm.errors import DataError
from compressm.experiments.tasks.datasets.tokens import Tokens

NOT_ASKED = -100  # in the place of an answer: the target that a cross-entropy ignores
STREAM = 0x9E3779B1  # odd and large: seeds of two streams do not meet


@dataclass(frozen=True)
class Drawn(Tokens):
    """Sequences that are drawn when they are asked for.

    Attributes:
        name: for reports.
        length: tokens of a sequence.
        device: of what is drawn.
        stream: sequences of different streams have nothing in common, whatever their seeds.
    """

    kind: ClassVar[str] = "tokens that are drawn with their answers"

    name: str
    length: int
    device: torch.device
    _: KW_ONLY
    stream: int = 0

    @property
    @abstractmethod
    def asked(self) -> int:
        """Places of every sequence that have an answer."""

    @abstractmethod
    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """The sequences of a seed.

        Returns:
            tokens (count, length) int64, and likewise the answer at every place, or ``NOT_ASKED``.
        """

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return replace(self, device=device)

    def held_out(self) -> Self:
        """Other sequences throughout, as there is no end of them."""
        return replace(self, stream=1)

    def own_seed(self, seed: int) -> int:
        """Of a random generator, which takes 32 bits of it."""
        return (seed + self.stream * STREAM) % 2**32


def distinct(count: int, numbers: int, chosen: int, generator: torch.Generator) -> Tensor:
    """(count, chosen) different numbers below ``numbers`` in each row, in random order."""
    return torch.rand(count, numbers, generator=generator).argsort(1)[:, :chosen]


def refuse_folder(name: str, folder: Path | None, made: str = "drawn at random") -> None:
    """Raise DataError if a folder is given, as there are no files.

    Args:
        made: how the data come about.
    """
    if folder is not None:
        raise DataError(f"--data-dir {folder}: expected no folder, as {name!r} is {made}. Leave it out")
