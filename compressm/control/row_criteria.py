"""By what rows of matrix-valued states, S_t = A_t S_{t-1} + k_t v_t^T and y_t = S_t^T q_t, are ranked: published criteria.

Heads of a group share k and q, so that a row of their states comes or goes in all of them.  The states of a selective scan are
rows as well: B_t makes its keys and C_t its queries, one group of all channels.  The rows with the largest scores are kept as
they are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressm.control.rrqr import pivoted, strong_pivots
from compressm.errors import check_integer, check_number


@dataclass(frozen=True, eq=False)
class RowMoments:
    """What is known of one layer's rows, G groups of N, all float64.

    Attributes:
        keys: (G, N, N), E[k k^T].
        queries: (G, N, N), E[q q^T].
        states: (G, N), E|S_n|^2, summed over a group's heads and their channels.
        outputs: (G, N), E|q_n S_n|^2, summed likewise.
        gradients: (G, N), sum of the squares of w dL/dw over the weights w that make a row's keys and queries, for criteria
            that want it; else None.
    """

    keys: Tensor
    queries: Tensor
    states: Tensor
    outputs: Tensor
    gradients: Tensor | None = None


class RowCriterion(ABC):
    """Scores the rows of matrix-valued states, and the states of selective scans.  Frozen and pure.

    Attributes:
        wants_gradients: whether it looks at ``RowMoments.gradients``, for which there must be calibration data.
    """

    wants_gradients: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """In reports."""
        return type(self).__name__

    @abstractmethod
    def row_scores(self, moments: RowMoments) -> Tensor:
        """(G, N) float64, non-negative."""

    def rows(self, moments: RowMoments, rank: int) -> Tensor:
        """(G, rank) int64 ascending, the rows to keep of every group: by default those with the largest scores."""
        scores = self.row_scores(moments)
        return scores.argsort(dim=-1, descending=True, stable=True)[:, :rank].sort(-1).values


@dataclass(frozen=True)
class GHOST(RowCriterion):
    """E|S_n|^2 E[q_n^2]: how much a row is excited times how much is read of it (Menezes and Kyrillidis, arXiv 2602.11408)."""

    def row_scores(self, moments: RowMoments) -> Tensor:
        return moments.states * moments.queries.diagonal(dim1=-2, dim2=-1)


@dataclass(frozen=True)
class OutputEnergy(RowCriterion):
    """E|q_n S_n|^2: the energy of what a row alone adds to the output."""

    def row_scores(self, moments: RowMoments) -> Tensor:
        return moments.outputs


@dataclass(frozen=True)
class Taylor(RowCriterion):
    """The sum of (w dL/dw)^2 over the weights that make a row's keys and queries (Molchanov et al., CVPR 2019).

    L is the product of the model's output with random numbers N(0, 1), anew for every batch: to first order the score is how
    much the output feels of these weights.  Where ``forward`` returns the loss, it is the loss itself, scaled at random.
    """

    wants_gradients: ClassVar[bool] = True

    def row_scores(self, moments: RowMoments) -> Tensor:
        assert moments.gradients is not None
        return moments.gradients


@dataclass(frozen=True)
class DRRQR(RowCriterion):
    """Strong rank-revealing QR of all queries and keys, one above the other (Nazari and Rusch, arXiv 2602.04852).

    Of a group's N columns those are kept from which the others can be predicted with coefficients of at most ``factor``; found
    from E[k k^T] + E[q q^T], which has the same R.  A score is the square of an entry of R's diagonal with column pivoting.
    The published pruner looks at a sample of rows and swaps at most 20 times; so may this.

    Args:
        factor: at least 1; smaller ones take more swaps.
        swaps: at most so many for a group.
    """

    factor: float = 1.5
    swaps: int = 20

    def __post_init__(self) -> None:
        check_number("factor", self.factor, "a number of at least 1", lambda factor: 1 <= factor < math.inf)
        check_integer("swaps", self.swaps, 0)

    def row_scores(self, moments: RowMoments) -> Tensor:
        found = []
        for gram in moments.keys + moments.queries:
            order, squares = pivoted(gram, len(gram))
            found.append(torch.empty_like(squares).scatter_(0, order, squares))
        return torch.stack(found)

    def rows(self, moments: RowMoments, rank: int) -> Tensor:
        grams = moments.keys + moments.queries
        return torch.stack([strong_pivots(gram, rank, self.factor, self.swaps) for gram in grams])
