"""Fewer states for a selective scan, whose B_t and C_t all channels share: a subset of the states and a new map for C.

With h_td the state of channel d at step t, the output is y_td = C_t h_td.  Any subset S of the states stays a selective scan,
and so does any linear map F on C_t: y_td = (F C_t) h_td[S].  Both are found from second moments on data:

* backward: remove the state whose loss costs least when the kept ones predict it linearly, h_j ~ sum_i w_i h_i, C_i += w_i C_j
  (the optimal brain surgeon, Hassibi and Stork 1993, with P = E[h h^T] and Q = E[C C^T]);
* forward: add the state whose contribution C_tn h_tdn explains most of what is left of y (orthogonal least squares, Chen,
  Billings and Luo 1989);
* then the least-squares F for the subset, from per-step moments M_t = sum_d h_td h_td^T, by preconditioned conjugate gradients.

The subset whose refitted error is smaller wins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compressm.control.row_criteria import RowCriterion, RowMoments
from compressm.control.siso import siso_hankel_singular_values
from compressm.errors import check_integer

RIDGE = 1e-6  # share of the mean diagonal of P added before inverting it
REFIT_RIDGE = 1e-4  # share of the mean diagonal of the normal equations that pulls F to the plain subset
REFIT_TOLERANCE = 1e-8  # relative residual of the normal equations
REFIT_ITERATIONS = 300


@dataclass(frozen=True, eq=False)
class MeanSystem:
    """The time-invariant surrogate of every channel: the scan with its averages in place of what depends on the token.

    Attributes:
        log_lam: (D, N) float64, log of the mean of exp(dt_t A).
        B: (D, N) float64, mean of dt_t B_t.
        C: (N,) float64, mean of C_t.
    """

    log_lam: Tensor
    B: Tensor
    C: Tensor

    def hankel_singular_values(self) -> Tensor:
        """(N,) float64, descending: the k-th largest of every channel, averaged over the channels."""
        return siso_hankel_singular_values(self.log_lam, self.B * self.C).mean(0)

    def scores(self) -> Tensor:
        """(N,) float64: for every state, the sum over channels of its Hankel singular value on its own, |b c| / (1 - a^2)."""
        return ((self.B * self.C).abs() / -torch.expm1(2 * self.log_lam)).sum(0)


@dataclass(frozen=True, eq=False)
class SelectiveMoments:
    """Second moments of one selective scan.

    Attributes:
        P: (N, N) float64, sum over channels of E[h h^T].
        Q: (N, N) float64, E[C C^T].
        M: (T, N, N), sum over channels of h h^T at T steps; empty (0, N, N) without data.
        C: (T, N), C_t at the same steps.
        mean: the surrogate of recipe "paper".
        B: (N, N) float64, E[B B^T].
        gradients: (1, N) float64, see :class:`compressm.control.RowMoments`; None where no criterion wanted them.
    """

    P: Tensor
    Q: Tensor
    M: Tensor
    C: Tensor
    mean: MeanSystem
    B: Tensor
    gradients: Tensor | None = None

    @property
    def order(self) -> int:
        """States N."""
        return self.P.shape[0]

    @property
    def steps(self) -> int:
        """Steps T at which the states were looked at."""
        return self.M.shape[0]

    def rows(self) -> RowMoments:
        """What criteria look at, one group; without data h and C count as independent."""
        states = self.P.diagonal()
        if self.steps:
            outputs = (self.M.diagonal(dim1=-2, dim2=-1).double() * self.C.double().square()).mean(0)
        else:
            outputs = states * self.Q.diagonal()
        return RowMoments(self.B[None], self.Q[None], states[None], outputs[None], self.gradients)


@dataclass(frozen=True, eq=False)
class SelectiveReduction:
    """A smaller selective scan.

    Attributes:
        states: (r,) int64 ascending, the kept ones.
        mix: (r, N) float64, F: the new C_t is ``mix @ C_t``.
        method: how it was found.
        output_error: relative root mean square error of the layer's scan on the steps looked at; None where none were.
    """

    states: Tensor
    mix: Tensor
    method: str
    output_error: float | None

    @property
    def order(self) -> int:
        """States kept."""
        return len(self.states)

    def kept(self, order: int) -> Tensor:
        """(r,) int64 ascending: which of the ``order`` old states are kept."""
        return self.states

    @property
    def real_order(self) -> int:
        """Values of the spectrum that belong to the kept states: one each."""
        return len(self.states)


def mean_subset(moments: SelectiveMoments, rank: int) -> SelectiveReduction:
    """The ``rank`` states with the largest surrogate Hankel singular values, C as it is.

    Raises:
        ArgumentError: rank out of range.
    """
    check_integer("rank", rank, 1, moments.order)
    order = torch.sort(moments.mean.scores(), descending=True, stable=True).indices
    states = order[:rank].sort().values
    plain = _selection(states, moments.order)
    return SelectiveReduction(states, plain, "mean-LTI subset", _error(moments, states, plain))


def best_states(moments: SelectiveMoments, rank: int, criterion: RowCriterion) -> SelectiveReduction:
    """The ``rank`` states that a criterion chooses, C as it is.

    Raises:
        ArgumentError: rank out of range.
    """
    check_integer("rank", rank, 1, moments.order)
    (states,) = criterion.rows(moments.rows(), rank)
    plain = _selection(states, moments.order)
    return SelectiveReduction(states, plain, criterion.name, _error(moments, states, plain))


def refitted_subset(moments: SelectiveMoments, rank: int) -> SelectiveReduction:
    """The better of the backward and the forward subset, C refitted; without data the backward one with its own map.

    Raises:
        ArgumentError: rank out of range.
    """
    check_integer("rank", rank, 1, moments.order)
    states, mix = backward_subset(moments.P, moments.Q, rank)
    if moments.steps == 0:
        return SelectiveReduction(states, mix, "backward subset, C predicted", None)
    found = []
    for name, subset in (("backward", states), ("forward", forward_subset(moments, rank))):
        refit = refitted_mix(moments, subset)
        found.append(SelectiveReduction(subset, refit, f"{name} subset, C refitted", _error(moments, subset, refit)))
    return min(found, key=lambda reduction: math.inf if reduction.output_error is None else reduction.output_error)


def backward_subset(P: Tensor, Q: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Remove states one by one, each predicted from the rest; returns the kept ones (r,) ascending and F (r, N)."""
    n = P.shape[0]
    eye = torch.eye(n, dtype=P.dtype, device=P.device)
    trace = torch.trace(P)
    inverse = torch.linalg.inv(P + (RIDGE * trace / n if bool(trace > 0) else 1.0) * eye)
    mix, alive = eye.clone(), torch.ones(n, dtype=torch.bool, device=P.device)
    for _ in range(n - rank):
        cost = ((mix @ Q) * mix).sum(1) / inverse.diagonal()
        state = int(torch.where(alive, cost, torch.inf).argmin())
        weight = inverse[:, state] / inverse[state, state]
        mix = mix - weight[:, None] * mix[state]
        inverse = inverse - weight[:, None] * inverse[state]
        alive[state] = False
        mix[state] = 0
        inverse[state], inverse[:, state] = 0, 0
        inverse[state, state] = 1
    states = alive.nonzero().flatten()
    return states, mix[states]


def forward_subset(moments: SelectiveMoments, rank: int) -> Tensor:
    """Add states one by one by how much of the output they explain; returns (r,) ascending."""
    C = moments.C.to(torch.float64)
    gram = torch.zeros_like(moments.P)  # of the contributions C_tn h_tdn
    for first in range(0, moments.steps, 256):
        part = slice(first, first + 256)
        gram += (moments.M[part].to(torch.float64) * C[part, :, None] * C[part, None, :]).sum(0)
    target = gram.sum(1)
    floor = 1e-12 * gram.diagonal().max()
    alive = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    for _ in range(rank):
        rest = gram.diagonal()
        gain = torch.where(rest > floor, target.square() / rest.clamp_min(1e-300), rest * 0)
        state = int(torch.where(alive, gain, -1.0).argmax())
        alive[state] = False
        if bool(rest[state] > floor):
            column = gram[:, state].clone() / rest[state]
            target = target - column * target[state].clone()
            gram = gram - column[:, None] * gram[state].clone()
    return (~alive).nonzero().flatten()


def refitted_mix(moments: SelectiveMoments, states: Tensor) -> Tensor:
    """F (r, N) that minimises sum_td (y_td - (F C_t) h_td[S])^2, with a slight pull to the plain subset.

    The normal equations sum_t M_t[S, S] F C_t C_t^T + mu F = sum_t M_t[S, :] C_t C_t^T + mu F_0 are solved by conjugate
    gradients, preconditioned with their value for independent h and C.
    """
    r = len(states)
    C = moments.C.to(torch.float64)
    kept = moments.M[:, states].to(torch.float64)
    square = kept[:, :, states].contiguous()
    plain = _selection(states, moments.order)
    size = torch.einsum("tnn,tm->", square, C.square()) / (r * moments.order)
    mu = REFIT_RIDGE * size

    def apply(F: Tensor) -> Tensor:
        return torch.bmm(square, (C @ F.T)[:, :, None])[:, :, 0].T @ C + mu * F

    right = torch.bmm(kept, C[:, :, None])[:, :, 0].T @ C + mu * plain
    weight, basis = torch.linalg.eigh(square.sum(0) / moments.steps)
    weight_C, basis_C = torch.linalg.eigh(C.T @ C)
    scale = 1 / (weight.clamp_min(0)[:, None] * weight_C.clamp_min(0) + mu)

    def precondition(residual: Tensor) -> Tensor:
        return basis @ ((basis.T @ residual @ basis_C) * scale) @ basis_C.T

    return _conjugate_gradients(apply, precondition, right, plain)


def _conjugate_gradients(apply, precondition, right: Tensor, start: Tensor) -> Tensor:
    x, residual = start.clone(), right - apply(start)
    direction = z = precondition(residual)
    product, goal = (residual * z).sum(), REFIT_TOLERANCE * right.norm()
    for _ in range(REFIT_ITERATIONS):
        if bool(residual.norm() <= goal):
            break
        image = apply(direction)
        step = product / (direction * image).sum()
        x, residual = x + step * direction, residual - step * image
        z = precondition(residual)
        product, last = (residual * z).sum(), product
        direction = z + (product / last) * direction
    return x


def _error(moments: SelectiveMoments, states: Tensor, mix: Tensor) -> float | None:
    """Relative root mean square error of the output on the steps looked at."""
    if moments.steps == 0:
        return None
    C = moments.C.to(torch.float64)
    change = C.clone()  # coefficients on h of y - y_reduced
    change[:, states] -= C @ mix.T
    numerator = denominator = 0.0
    for first in range(0, moments.steps, 256):
        part = slice(first, first + 256)
        M = moments.M[part].to(torch.float64)
        numerator += float(torch.einsum("tn,tnm,tm->", change[part], M, change[part]))
        denominator += float(torch.einsum("tn,tnm,tm->", C[part], M, C[part]))
    return (max(numerator, 0.0) / denominator) ** 0.5 if denominator > 0 else 0.0


def _selection(states: Tensor, order: int) -> Tensor:
    plain = torch.zeros(len(states), order, dtype=torch.float64, device=states.device)
    plain[torch.arange(len(states), device=states.device), states] = 1
    return plain
