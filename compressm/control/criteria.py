"""By what single states of a diagonal system are ranked: the criteria that are published beside Hankel singular values.

A criterion gives every mode of a system, lam_i with its row b_i of B and its column c_i of C, a number; the modes with the
largest are kept as they are.  They look at each mode alone: two that cancel each other both count.  Those for the rows of
matrix-valued and selective states are in ``row_criteria``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from compressm.control.balancing import Reduction
from compressm.control.coordinates import Coordinates
from compressm.control.row_criteria import RowCriterion, RowMoments
from compressm.control.system import DiagonalSystem
from compressm.errors import check_integer


class Criterion(ABC):
    """Scores the modes of a time-invariant system.

    Frozen and pure; the gauge of a mode, which B and C may share as they like, has no say.
    """

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
class Modulus(Criterion):
    """The modulus of lam_i: modal truncation that keeps the slowest modes, which goes with an l1 norm of the moduli in the loss
    (Forgione, Mejari and Piga, CDC 2024).
    """

    def scores(self, system: DiagonalSystem) -> Tensor:
        return system.log_lam.real.exp()


@dataclass(frozen=True)
class LAST(Criterion):
    """The square of :class:`PeakGain`, as a share of the sum of itself and all that are larger (Gwak et al., NeurIPS 2024).

    The largest score of every layer is 1, so that scores of different layers can be compared: with :class:`compressm.Largest`
    as the policy the states with the least scores go, wherever they are.  Within a layer the order is that of ``PeakGain``.
    """

    def scores(self, system: DiagonalSystem) -> Tensor:
        return share_of_larger(PeakGain().scores(system).square())


@dataclass(frozen=True)
class AIRE(Criterion):
    """The square of :class:`ImpulseEnergy`, as a share of the sum of itself and all that are larger (AIRE-Prune, ICLR 2026).

    Scores of different layers can be compared, as those of :class:`LAST`.  Both methods' published code takes the norm of C to
    the first power in layers of two directions, where operators bind in another way than the papers' formula, which is this.
    """

    def scores(self, system: DiagonalSystem) -> Tensor:
        return share_of_larger(ImpulseEnergy().scores(system).square())


@dataclass(frozen=True)
class RandomModes(Criterion, RowCriterion):
    """Chance: the control for all others, for states of any kind.

    Args:
        seed: of the draw; layers of one size draw the same.
    """

    seed: int = 0

    def scores(self, system: DiagonalSystem) -> Tensor:
        return self._drawn(system.order).to(system.log_lam.device)

    def row_scores(self, moments: RowMoments) -> Tensor:
        return self._drawn(*moments.states.shape).to(moments.states.device)

    def _drawn(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)


def share_of_larger(scores: Tensor) -> Tensor:
    """(N,) each score over the sum of itself and all that are larger; zeros stay zero."""
    ordered = scores.sort(descending=True, stable=True)
    shares = ordered.values / ordered.values.cumsum(0).clamp_min(torch.finfo(scores.dtype).tiny)
    return torch.empty_like(scores).scatter_(0, ordered.indices, shares)


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
    check_integer("rank", rank, 1, len(scores))
    return scores.argsort(descending=True, stable=True)[:rank].sort().values
