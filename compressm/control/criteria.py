"""By what single states of a diagonal system are ranked: the criteria that are published beside Hankel singular values.

A criterion gives every mode of a system, lam_i with its row b_i of B and its column c_i of C, a number; the modes with the
largest are kept as they are.  They look at each mode alone: two that cancel each other both count.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from compressm.control.balancing import Reduction
from compressm.control.coordinates import Coordinates
from compressm.control.system import DiagonalSystem, check_rank


class Criterion(ABC):
    """Scores the modes of a system.  Frozen and pure; the gauge of a mode, which B and C may share as they like, has no say."""

    @property
    def name(self) -> str:
        """In reports."""
        return type(self).__name__

    @abstractmethod
    def scores(self, system: DiagonalSystem) -> Tensor:
        """(N,) float64, non-negative, of an unbatched system."""


@dataclass(frozen=True)
class Magnitude(Criterion):
    """||b_i|| ||c_i||: how large the parameters of a mode are."""

    def scores(self, system: DiagonalSystem) -> Tensor:
        return torch.linalg.vector_norm(system.B, dim=1) * torch.linalg.vector_norm(system.C, dim=0)


@dataclass(frozen=True)
class PeakGain(Criterion):
    """||b_i|| ||c_i|| / (1 - |lam_i|), the H-infinity norm of a mode alone: modal truncation by dominance.

    Its square is the score of LAST (Gwak et al., NeurIPS 2024), whose order is the same.
    """

    def scores(self, system: DiagonalSystem) -> Tensor:
        return Magnitude().scores(system) / -torch.expm1(system.log_lam.real)


@dataclass(frozen=True)
class ImpulseEnergy(Criterion):
    """||b_i|| ||c_i|| / sqrt(1 - |lam_i|^2), the H2 norm of a mode alone: the energy of its impulse response.

    Its square is the score of AIRE-Prune (ICLR 2026), whose order is the same.
    """

    def scores(self, system: DiagonalSystem) -> Tensor:
        return Magnitude().scores(system) / (-torch.expm1(2 * system.log_lam.real)).sqrt()


@dataclass(frozen=True)
class RandomModes(Criterion):
    """Chance: the control for all others.

    Args:
        seed: of the draw; layers of one size draw the same.
    """

    seed: int = 0

    def scores(self, system: DiagonalSystem) -> Tensor:
        drawn = torch.rand(system.order, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        return drawn.to(system.log_lam.device)


def keep_modes(system: DiagonalSystem, modes: Tensor, method: str) -> Reduction:
    """The system of some of its own modes.

    Args:
        system: unbatched.
        modes: (rank,) int64, which.
        method: how they were chosen, in words.
    """
    coordinates = Coordinates.of(system, "real")
    left = coordinates.mode_rows(modes)
    multiplicity = torch.full((len(modes),), 2.0, dtype=torch.float64, device=modes.device)
    kept = DiagonalSystem(system.log_lam[modes], system.B[modes], system.C[:, modes])
    slowest = float(kept.log_lam.real.max().exp())
    return Reduction(kept, left.mH / 2, left, multiplicity, method, 1.0, slowest, len(modes))


def best_modes(scores: Tensor, rank: int) -> Tensor:
    """(rank,) int64 ascending: the modes with the largest scores.

    Raises:
        ArgumentError: rank is not between 1 and their number.
    """
    check_rank(rank, len(scores))
    return scores.argsort(descending=True, stable=True)[:rank].sort().values
