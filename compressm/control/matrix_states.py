"""Fewer rows for matrix-valued states that decay by a scalar: S_t = a_t S_{t-1} + k_t v_t^T, y_t = S_t^T q_t.

Heads of a group share k and q, and any maps k' = E_k k, q' = E_q q give the same recurrence for E_k S.  Two forms:

* projected: E|q^T (I - E_q^T E_k) S|^2 for q and S that count as independent is least where E_q^T E_k is the truncated balanced
  pair of P = E[k k^T] and Q = E[q q^T] (the theorem of Eckart and Young on L_Q^T L_P, P = L_P L_P^T, Q = L_Q L_Q^T);
* strict: a subset of the rows.  With z_n = q_n S_n, the output is the sum of the z_n, so that the energy of what a set of rows
  would take away is a sum over E[z z^T].  Rows are removed one by one, each time the one that adds least.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressm.control.balancing import singular_values
from compressm.control.row_criteria import RowCriterion, RowMoments
from compressm.control.selective import backward_subset
from compressm.errors import bad_argument, check_integer

FLOOR = 1e-12  # least eigenvalue of a second moment scaled to a unit diagonal, so that pairs of any rank have bases


@dataclass(frozen=True, eq=False)
class MatrixMoments:
    """Second moments of one layer's scan, G groups of states with N rows.

    Attributes:
        P: (G, N, N) float64, E[k k^T].
        Q: (G, N, N) float64, E[q q^T].
        Z: (G, N, N) float64, E[z z^T], summed over a group's heads and their channels.
        M: (T, G, N, N), S S^T at T steps, summed likewise; T may be 0.
        q: (T, G, N), q_t at the same steps.
        erased: (G, N, N) float64, what ``Q`` holds beside E[q q^T]; None: nothing.
        gradients: (G, N) float64, see :class:`compressm.control.RowMoments`; None where no criterion wanted them.
    """

    P: Tensor
    Q: Tensor
    Z: Tensor
    M: Tensor
    q: Tensor
    erased: Tensor | None = None
    gradients: Tensor | None = None

    @property
    def order(self) -> int:
        """Rows N."""
        return self.P.shape[-1]

    def rows(self) -> RowMoments:
        """What criteria look at; where no states were looked at they count as the keys."""
        states = self.M.double().mean(0) if len(self.M) else self.P
        queries = self.Q if self.erased is None else self.Q - self.erased
        excited, outputs = (part.diagonal(dim1=-2, dim2=-1) for part in (states, self.Z))
        return RowMoments(self.P, queries, excited, outputs, self.gradients)


@dataclass(frozen=True, eq=False)
class MatrixReduction:
    """Fewer rows of the states.

    Attributes:
        key, query: (G, r, N) float64, E_k and E_q.
        rows: (G, r) int64 ascending, the rows that keys are, where they are a subset; else None.
        method: how it was found.
        output_error: relative root mean square error of the scan's output at the steps looked at; None where none were.
    """

    key: Tensor
    query: Tensor
    rows: Tensor | None
    method: str
    output_error: float | None

    @property
    def order(self) -> int:
        """Rows that are left."""
        return self.key.shape[1]

    @property
    def real_order(self) -> int:
        """Values of the spectrum that belong to them: one each."""
        return self.order

    def kept(self, order: int) -> Tensor:
        """(r,) int64 ascending: the old rows that take most part in the new ones, over all groups."""
        shares = (self.key * self.query).abs().sum((0, 1))
        return shares.sort(descending=True, stable=True).indices[: self.order].sort().values


def pair_spectrum(moments: MatrixMoments) -> Tensor:
    """(N,) float64 descending: what the projected form loses at rank r is the sum of squares from the r-th on.

    Groups add up, as all keep the same number of rows.
    """
    pairs = zip(moments.P, moments.Q, strict=True)
    return torch.stack([singular_values(P, Q) for P, Q in pairs]).square().sum(0).sqrt()


def subset_spectrum(moments: MatrixMoments) -> Tensor:
    """(N,) float64 descending: what the strict form loses at rank r is at most the sum of squares from the r-th on.

    The squares are what the removals add to the energy taken away.  A removal may take some of it back: then the largest value
    so far stands for all since, and likewise each value is at least those behind it.
    """
    lost = torch.stack([removals(Z)[1] for Z in moments.Z]).sum(0)
    lost = torch.cat([lost.new_zeros(1), lost]).cummax(0).values
    return lost.diff().clamp_min(0).cummax(0).values.flip(0).sqrt()


def projection(moments: MatrixMoments, rank: int) -> MatrixReduction:
    """The balanced pair of every group, cut at ``rank``.

    Raises:
        ArgumentError: rank out of range.
    """
    check_integer("rank", rank, 1, moments.order)
    maps = [balanced_pair(P, Q, rank) for P, Q in zip(moments.P, moments.Q, strict=True)]
    key, query = (torch.stack(part) for part in zip(*maps, strict=True))
    return MatrixReduction(key, query, None, "projected, balanced pair", output_error(moments, key, query))


def erasing_projection(moments: MatrixMoments, rank: int) -> MatrixReduction:
    """For the delta rule, S_t = (I - beta k k^T) S_{t-1} + beta k v^T, whose keys read the state as well as the queries.

    With E[q q^T] + E[beta^2 k k^T] as ``Q`` of the moments.  E_k = U^T has orthonormal rows that span those of the balanced
    pair: no key becomes longer, and no step unstable.  E_q = (U^T P U)^{-1} U^T P reads best what they keep.

    Raises:
        ArgumentError: rank out of range.
    """
    check_integer("rank", rank, 1, moments.order)
    keys, queries = [], []
    for P, Q in zip(moments.P, moments.Q, strict=True):
        U = torch.linalg.qr(balanced_pair(P, Q, rank)[0].mT).Q
        kept = U.mT @ P
        square = kept @ U
        ridge = 1e-6 * square.diagonal().mean().clamp_min(torch.finfo(P.dtype).tiny)
        keys.append(U.mT)
        queries.append(torch.linalg.solve(square + ridge * torch.eye(rank).to(P), kept))
    key, query = torch.stack(keys), torch.stack(queries)
    return MatrixReduction(key, query, None, "projected, orthonormal keys", output_error(moments, key, query))


def subset(moments: MatrixMoments, rank: int) -> MatrixReduction:
    """The ``rank`` rows of every group that are left after backward selection.

    Raises:
        ArgumentError: rank out of range.
    """
    check_integer("rank", rank, 1, moments.order)
    gone = moments.order - rank
    rows = torch.stack([removals(Z)[0][gone:].sort().values for Z in moments.Z])
    return keep_rows(moments, rows, "strict, backward subset")


def turning_spectrum(moments: MatrixMoments) -> Tensor:
    """(N,) float64 descending: :func:`subset_spectrum` where rows go in pairs, as :func:`turning_subset` takes them.

    The values of a pair are equal.
    """
    return subset_spectrum(_pairs(moments)).repeat_interleave(2) * 0.5**0.5


def turning_subset(moments: MatrixMoments, rank: int) -> MatrixReduction:
    """Where rows j and j + N / 2 turn together, all groups alike: the pairs that are left after backward selection.

    Every group keeps the same ones.  Moments are those of turned keys and queries.

    Raises:
        ArgumentError: rank out of range, or odd.
    """
    check_integer("rank", rank, 2, moments.order)
    check_pairs(rank)
    pairs = moments.order // 2
    kept = removals(_pairs(moments).Z[0])[0][pairs - rank // 2 :].sort().values
    rows = torch.cat([kept, pairs + kept]).expand(len(moments.P), -1)
    return keep_rows(moments, rows, "strict, backward subset of pairs")


def check_pairs(rank: int) -> None:
    """Raise ArgumentError for a number of rows that turn together in pairs if it is odd."""
    if rank % 2:
        raise bad_argument("rank", got=rank, expected="an even number, as channels turn with their position in pairs")


def _pairs(moments: MatrixMoments) -> MatrixMoments:
    """With E[z z^T] of pairs, z being the sum over both, and over all groups."""
    energies = moments.Z.sum(0).unflatten(0, (2, -1)).unflatten(2, (2, -1)).sum((0, 2))
    return replace(moments, Z=energies[None])


def best_rows(moments: MatrixMoments, rank: int, criterion: RowCriterion) -> MatrixReduction:
    """The ``rank`` rows of every group that a criterion chooses.

    Raises:
        ArgumentError: rank out of range.
    """
    check_integer("rank", rank, 1, moments.order)
    return keep_rows(moments, criterion.rows(moments.rows(), rank), f"strict, {criterion.name}")


def keep_rows(moments: MatrixMoments, rows: Tensor, method: str) -> MatrixReduction:
    """The states of some of their own rows, (G, r) ascending; ``method`` says how they were chosen, in words."""
    maps = torch.eye(moments.order, dtype=torch.float64, device=rows.device)[rows]
    return MatrixReduction(maps, maps, rows, method, output_error(moments, maps, maps))


def predicted_subset(moments: MatrixMoments, rank: int) -> MatrixReduction:
    """For decays of rows, S_t = diag(a_t) S_{t-1} + k_t v_t^T, of which a subset of the rows is the only smaller recurrence.

    Any map of the queries may read what is left.  Rows are removed one by one, each predicted from those that stay, with
    E[S S^T] as ``P`` of the moments.

    Raises:
        ArgumentError: rank out of range.
    """
    check_integer("rank", rank, 1, moments.order)
    found = [backward_subset(P, Q, rank) for P, Q in zip(moments.P, moments.Q, strict=True)]
    rows, query = (torch.stack(part) for part in zip(*found, strict=True))
    key = torch.eye(moments.order, dtype=torch.float64, device=rows.device)[rows]
    return MatrixReduction(key, query, rows, "backward subset, queries predicted", output_error(moments, key, query))


def balanced_pair(P: Tensor, Q: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """E_k and E_q (rank, N) of one group: in the new coordinates both second moments are the leading singular values."""
    L_p, L_q = _root(P), _root(Q)
    U, sigma, V = torch.linalg.svd(L_q.mT @ L_p)
    scale = sigma[:rank].rsqrt()
    return (L_q @ U[:, :rank] * scale).mT, (L_p @ V[:rank].mT * scale).mT


def removals(Z: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy backward selection on E[z z^T] (N, N).

    Returns:
        (N,) int64, the rows in the order in which they go, and (N,) float64, the energy E|sum of z over those gone|^2 after
        each.
    """
    n = len(Z)
    alive = torch.ones(n, dtype=torch.bool, device=Z.device)
    cross = torch.zeros_like(Z[0])  # of every row with those that are gone
    order, lost, total = [], [], torch.zeros((), dtype=Z.dtype, device=Z.device)
    for _ in range(n):
        cost = 2 * cross + Z.diagonal()
        row = int(torch.where(alive, cost, torch.inf).argmin())
        total = total + cost[row]
        alive[row] = False
        cross = cross + Z[:, row]
        order.append(row)
        lost.append(total)
    return torch.tensor(order, device=Z.device), torch.stack(lost).clamp_min(0)


def output_error(moments: MatrixMoments, key: Tensor, query: Tensor) -> float | None:
    """Relative root mean square of q^T (I - E_q^T E_k) S at the steps looked at; None where none were."""
    if not len(moments.q):
        return None
    lost = total = 0.0
    for M, q in zip(moments.M.split(64), moments.q.split(64), strict=True):
        wide, q = M.double(), q.double()
        change = q - torch.einsum("tgn,grn,grm->tgm", q, query, key)
        lost += float(torch.einsum("tgn,tgnm,tgm->", change, wide, change))
        total += float(torch.einsum("tgn,tgnm,tgm->", q, wide, q))
    return (max(lost, 0.0) / total) ** 0.5 if total > 0 else 0.0


def _root(moment: Tensor) -> Tensor:
    """L (N, N) with L L^T = moment but for directions that are not excited, which count as excited a little."""
    size = moment.diagonal().clamp_min(0)
    least = FLOOR * size.mean() if bool(size.any()) else torch.ones_like(size[0])
    dead, scale = size < least, size.clamp_min(least).sqrt()
    correlation = moment / (scale[:, None] * scale) + torch.diag(dead.to(moment))
    weight, basis = torch.linalg.eigh(0.5 * (correlation + correlation.mT))
    return scale[:, None] * basis * weight.clamp_min(FLOOR).sqrt()
