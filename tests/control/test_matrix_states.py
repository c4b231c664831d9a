"""Matrix-valued states with fewer rows: the balanced pair and the backward subset, against brute force on samples."""

from __future__ import annotations

import itertools

import pytest
import torch

from compressm.control import MatrixMoments, pair_spectrum, predicted_subset, projection, subset, subset_spectrum
from compressm.control.matrix_states import balanced_pair, removals
from compressm.errors import ArgumentError


def samples(steps=40, groups=2, order=5, channels=3, seed=0):
    """Queries q (T, G, N) and states S (T, G, N, channels) with correlated rows."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    S = normal(groups, order, order) @ normal(steps, groups, order, channels)
    return torch.einsum("gnm,tgm->tgn", normal(groups, order, order), normal(steps, groups, order)), S


def moments_of(q, S, steps=None):
    z = q[..., None] * S
    P = torch.einsum("tgnc,tgmc->gnm", S, S) / len(S)
    Q, Z = torch.einsum("tgn,tgm->gnm", q, q) / len(q), torch.einsum("tgnc,tgmc->gnm", z, z) / len(z)
    return MatrixMoments(P, Q, Z, (S @ S.mT)[:steps], q[:steps])


def output(q, S):
    return torch.einsum("tgn,tgnc->tgc", q, S)


def read(reduction, q, S):
    """The output of the reduced scan."""
    return output(torch.einsum("grn,tgn->tgr", reduction.query, q), torch.einsum("grn,tgnc->tgrc", reduction.key, S))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_pair_loses_the_tail_and_no_other_map_loses_less(rank):
    """Every query meets every state, which makes them independent."""
    q, S = samples()
    moments = moments_of(q, S)
    reduction = projection(moments, rank)
    every_q, every_S = q.repeat_interleave(len(S), 0), S.repeat(len(q), 1, 1, 1)
    lost = (output(every_q, every_S) - read(reduction, every_q, every_S)).square().sum() / len(every_q)
    torch.testing.assert_close(lost, pair_spectrum(moments)[rank:].square().sum(), rtol=1e-9, atol=0.0)
    maps = (reduction.query.mT @ reduction.key).requires_grad_()

    def loss(product):
        change = torch.eye(5, dtype=torch.float64) - product
        return torch.einsum("gnm,gmk,gkl,gnl->", moments.Q, change, moments.P, change)

    torch.testing.assert_close(loss(maps).detach(), lost)
    E_k, E_q = reduction.key.clone().requires_grad_(), reduction.query.clone().requires_grad_()
    for gradient in torch.autograd.grad(loss(E_q.mT @ E_k), (E_k, E_q)):
        assert gradient.norm() < 1e-9 * lost
    for seed in range(20):  # and what is near by is worse
        near = [E + 0.05 * torch.randn(E.shape, generator=torch.Generator().manual_seed(seed)).double() for E in (E_q, E_k)]
        assert loss(near[0].mT @ near[1]) > lost


def test_the_pair_is_balanced():
    moments = moments_of(*samples(groups=1))
    E_k, E_q = balanced_pair(moments.P[0], moments.Q[0], 3)
    leading = torch.diag(pair_spectrum(moments)[:3])
    torch.testing.assert_close(E_k @ moments.P[0] @ E_k.mT, leading)
    torch.testing.assert_close(E_q @ moments.Q[0] @ E_q.mT, leading)


def test_all_rows_change_nothing_even_where_some_are_dead_or_equal():
    q, S = samples()
    S[:, 0, 1], q[:, 0, 2] = 0, 0
    S[:, 1, 3] = S[:, 1, 4]
    moments = moments_of(q, S)
    for reduce in (projection, subset):
        reduction = reduce(moments, 5)
        assert reduction.output_error < 1e-6
        torch.testing.assert_close(read(reduction, q, S), output(q, S), rtol=1e-5, atol=1e-5)
    assert projection(moments, 5).key.isfinite().all()
    blank = MatrixMoments(*(torch.zeros_like(part) for part in (moments.P, moments.Q, moments.Z, moments.M, moments.q)))
    torch.testing.assert_close(projection(blank, 2).key.norm(dim=-1), torch.ones(2, 2, dtype=torch.float64))


def test_removals_are_greedy_and_their_energy_is_what_is_taken_away():
    q, S = samples(groups=1, order=6)
    order, lost = removals(moments_of(q, S).Z[0])
    z = (q[..., None] * S)[:, 0]

    def energy(rows):
        return float(z[:, list(rows)].sum(1).square().sum() / len(z))

    gone = []
    for row, cost in zip(order.tolist(), lost.tolist(), strict=True):
        best = min((energy([*gone, other]), other) for other in range(6) if other not in gone)
        gone.append(row)
        assert best[1] == row
        assert cost == pytest.approx(best[0], rel=1e-9)


def test_predicted_queries_read_best_what_is_left():
    """Where queries and states are independent, whatever is read of the kept rows loses no less."""
    moments = moments_of(*samples())
    reduction = predicted_subset(moments, 3)
    assert reduction.key.argmax(-1).tolist() == reduction.rows.tolist()
    for P, E_q, rows in zip(moments.P, reduction.query, reduction.rows, strict=True):
        best = torch.linalg.solve(P[rows][:, rows], P[rows])
        torch.testing.assert_close(E_q, best, rtol=1e-3, atol=1e-4)


def test_the_subset_is_what_is_left_and_near_the_best():
    q, S = samples(groups=1, order=6)
    moments = moments_of(q, S)
    reduction = subset(moments, 3)
    assert reduction.rows.tolist() == [sorted(removals(moments.Z[0])[0][3:].tolist())]
    z = (q[..., None] * S)[:, 0]
    energies = {
        kept: float(z[:, [n for n in range(6) if n not in kept]].sum(1).square().sum())
        for kept in itertools.combinations(range(6), 3)
    }
    found = energies[tuple(reduction.rows[0].tolist())]
    assert found <= sorted(energies.values())[3]
    assert reduction.kept(6).tolist() == reduction.rows[0].tolist()


def test_the_spectrum_of_subsets_bounds_what_they_lose():
    q, S = samples()
    moments = moments_of(q, S)
    hsv = subset_spectrum(moments)
    assert (hsv.diff() <= 0).all()
    total = output(q, S).square().sum() / len(q)
    for rank in range(1, 5):
        reduction = subset(moments, rank)
        lost = (output(q, S) - read(reduction, q, S)).square().sum() / len(q)
        assert lost <= hsv[rank:].square().sum() * (1 + 1e-12)
        assert reduction.output_error == pytest.approx(float((lost / total).sqrt()), rel=1e-9)
        assert reduction.order == reduction.real_order == rank


def test_the_error_is_that_of_the_steps_looked_at():
    q, S = samples(steps=100)
    reduction = projection(moments_of(q, S, steps=70), 2)
    change = output(q, S)[:70] - read(reduction, q, S)[:70]
    assert reduction.output_error == pytest.approx(float(change.norm() / output(q, S)[:70].norm()), rel=1e-9)
    assert projection(moments_of(q, S, steps=0), 2).output_error is None


def test_ranks_out_of_range():
    moments = moments_of(*samples())
    for rank in (0, 6, True, 2.0):
        for reduce in (projection, subset):
            with pytest.raises(ArgumentError, match="rank"):
                reduce(moments, rank)
