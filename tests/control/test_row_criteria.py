"""Criteria that rank rows of matrix-valued states, each against what it stands for, on samples."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.linalg import qr

from compressm.control import DRRQR, GHOST, MatrixMoments, MeanSystem, OutputEnergy, RandomModes, SelectiveMoments, best_rows
from compressm.control.rrqr import pivoted, strong_pivots
from compressm.errors import ArgumentError

STEPS, G, N, CHANNELS = 40, 2, 6, 3


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def samples():
    """k and q (T, G, N), states S (T, G, N, channels)."""
    k, q = (torch.einsum("gnm,tgm->tgn", normal(G, N, N, seed=s), normal(STEPS, G, N, seed=s + 1)) for s in (1, 3))
    return k, q, torch.einsum("gnm,tgmc->tgnc", normal(G, N, N, seed=5), normal(STEPS, G, N, CHANNELS, seed=6))


def second(x):
    return torch.einsum("tgn,tgm->gnm", x, x) / STEPS


def moments_of(k, q, S, erased=None):
    z = q[..., None] * S
    Q = second(q) if erased is None else second(q) + erased
    return MatrixMoments(second(k), Q, torch.einsum("tgnc,tgmc->gnm", z, z) / STEPS, S @ S.mT, q, erased)


def test_energies_are_those_of_the_samples():
    k, q, S = samples()
    rows = moments_of(k, q, S).rows()
    z = q[..., None] * S
    torch.testing.assert_close(OutputEnergy().row_scores(rows), z.square().sum((0, -1)) / STEPS)
    product = S.square().sum(-1).mean(0) * q.square().mean(0)
    torch.testing.assert_close(GHOST().row_scores(rows), product)
    with_keys = moments_of(k, q, S, erased=second(k)).rows()  # the delta rule's keys read the states as well
    torch.testing.assert_close(GHOST().row_scores(with_keys), product)


def test_a_selective_scan_has_one_group_of_rows():
    h, B, C = normal(STEPS, 4, N), normal(STEPS, N, seed=1), normal(STEPS, N, seed=2)
    M = h.mT @ h
    mean = MeanSystem(-torch.ones(4, N, dtype=torch.float64), h.mean(0), C.mean(0))
    parts = (M.mean(0), C.T @ C / STEPS, M, C, mean, B.T @ B / STEPS)
    rows = SelectiveMoments(*parts).rows()
    torch.testing.assert_close(OutputEnergy().row_scores(rows), (C[:, None] * h).square().sum((0, 1))[None] / STEPS)
    torch.testing.assert_close(GHOST().row_scores(rows)[0], h.square().sum((0, 1)) / STEPS * C.square().mean(0))
    blind = SelectiveMoments(*parts[:2], M[:0], C[:0], *parts[4:]).rows()
    torch.testing.assert_close(OutputEnergy().row_scores(blind), GHOST().row_scores(rows))


def test_drrqr_is_that_of_keys_and_queries_one_above_the_other():
    k, q, S = samples()
    rows = moments_of(k, q, S).rows()
    scores = DRRQR().row_scores(rows)
    for group in range(G):
        stacked = torch.cat([k[:, group], q[:, group]])
        _, R, order = qr(stacked.numpy(), mode="economic", pivoting=True)
        found, squares = pivoted(rows.keys[group] + rows.queries[group], N)
        assert found.tolist() == order.tolist()
        torch.testing.assert_close(squares, torch.from_numpy(R.diagonal() ** 2) / STEPS)
        torch.testing.assert_close(scores[group, found], squares)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_no_swap_makes_the_volume_much_larger(factor):
    for seed in (0, 13, 14, 16, 30, 44):  # where greedy pivots are not the best
        X = normal(9, N, seed=seed)
        if seed > 14:
            X = X * torch.tensor([1, 1, 1e-1, 1, 1e-3, 1], dtype=torch.float64)
            X[:, 2] += X[:, 0]
        gram = X.T @ X
        for rank in range(1, N):
            kept = strong_pivots(gram, rank, factor, 100).tolist()
            volume = float(torch.linalg.det(gram[kept][:, kept]).sqrt())
            for gone, new in itertools.product(kept, set(range(N)) - set(kept)):
                other = [column for column in kept if column != gone] + [new]
                assert float(torch.linalg.det(gram[other][:, other]).sqrt()) <= factor * volume * (1 + 1e-9)


def test_swaps_repair_what_greedy_pivots_miss():
    """Kahan's matrix, whose columns greedy pivots take in their order whatever that hides."""
    n, cosine = 24, 0.6
    sine = (1 - cosine**2) ** 0.5
    upper = torch.eye(n, dtype=torch.float64) - cosine * torch.ones(n, n, dtype=torch.float64).triu(1)
    tilt = 1 - 1e-6 * torch.arange(n, dtype=torch.float64)  # so that rounding does not choose among equals
    X = (sine ** torch.arange(n, dtype=torch.float64))[:, None] * upper * tilt
    least = [float(torch.linalg.svdvals(X[:, strong_pivots(X.T @ X, n - 1, 1.5, swaps)])[-1]) for swaps in (0, 20)]
    assert least[1] > 2 * least[0]


def test_all_rows_and_dead_rows():
    k, q, S = samples()
    k[:, 0, 1] = q[:, 0, 1] = 0
    k[:, 1] = q[:, 1] = 0
    moments = moments_of(k, q, S)
    for criterion in (GHOST(), OutputEnergy(), DRRQR(), RandomModes(1)):
        assert best_rows(moments, N, criterion).rows.tolist() == [list(range(N))] * G
        kept = best_rows(moments, 4, criterion)
        assert kept.rows.shape == (G, 4)
        assert (kept.order, kept.method) == (4, f"strict, {criterion.name}")
        if not isinstance(criterion, RandomModes):
            assert 1 not in kept.rows[0].tolist()
        assert (kept.rows.diff() > 0).all()
    with pytest.raises(ArgumentError, match="rank"):
        best_rows(moments, N + 1, GHOST())


def test_chance_draws_for_every_group():
    rows = moments_of(*samples()).rows()
    first, again, other = (RandomModes(seed).rows(rows, 3) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    scores = RandomModes(1).row_scores(rows)
    assert not torch.equal(scores[0], scores[1])


def test_wrong_arguments_are_refused():
    for wrong in ({"factor": 0.9}, {"factor": float("inf")}, {"swaps": -1}, {"swaps": True}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            DRRQR(**wrong)
