"""Data that are sequences of tokens."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from compressm.experiments.tasks.parts import Data


class Tokens(Data):
    """Sequences of integers from 0 to ``vocabulary - 1``."""

    kind: ClassVar[str] = "tokens"

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Number of different tokens."""
