"""Subsets and refits of selective scans, against brute force on the steps themselves."""

from __future__ import annotations

import itertools

import pytest
import torch

from compressm.control import MeanSystem, SelectiveMoments, mean_subset, refitted_subset
from compressm.control.selective import REFIT_RIDGE, backward_subset, forward_subset, refitted_mix
from compressm.errors import ArgumentError


def scan_steps(steps=200, channels=4, order=6, seed=0, correlated=True):
    """States h (T, D, N) and maps C (T, N) with random correlations."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    mixing = normal(order, order) if correlated else torch.eye(order, dtype=torch.float64)
    return normal(steps, channels, order) @ mixing, normal(steps, order) @ normal(order, order) * 0.5 + normal(order)


def moments_of(h, C):
    order = h.shape[-1]
    M = h.mT @ h
    mean = MeanSystem(-torch.arange(1.0, order + 1).double().repeat(h.shape[1], 1) * 0.1, h.mean(0), C.mean(0))
    return SelectiveMoments(M.mean(0), C.T @ C / len(C), M, C, mean, torch.eye(order, dtype=torch.float64))


def output(h, C):
    return torch.einsum("tdn,tn->td", h, C)


def test_the_refit_is_the_least_squares_solution():
    h, C = scan_steps()
    states = torch.tensor([0, 2, 5])
    mix = refitted_mix(moments_of(h, C), states)
    features = torch.einsum("tdn,tm->tdnm", h[..., states], C).flatten(2).flatten(0, 1)
    plain, target = torch.eye(6, dtype=torch.float64)[states], output(h, C)
    ridge = (REFIT_RIDGE * features.square().sum() / 18).sqrt()
    rows = torch.cat([features, ridge * torch.eye(18, dtype=torch.float64)])
    right = torch.cat([target.flatten(), ridge * plain.flatten()])
    solution = torch.linalg.lstsq(rows, right).solution.view(3, 6)
    torch.testing.assert_close(mix, solution, rtol=1e-6, atol=1e-6)
    errors = [(output(h[..., states], C @ F.T) - target).norm() for F in (mix, plain)]
    assert errors[0] < errors[1]


def test_reported_error_is_that_of_the_output():
    h, C = scan_steps()
    for rank in (1, 3, 5):
        for find in (refitted_subset, mean_subset):
            reduction = find(moments_of(h, C), rank)
            reduced = output(h[..., reduction.states], C @ reduction.mix.T)
            expected = (reduced - output(h, C)).norm() / output(h, C).norm()
            assert reduction.output_error == pytest.approx(float(expected), rel=1e-9)
            assert reduction.order == rank
            assert list(reduction.states) == sorted(set(reduction.states.tolist()))


def test_redundant_states_go_without_loss():
    h, C = scan_steps(correlated=False)
    h[..., 4], h[..., 5] = 2 * h[..., 1], h[..., 0] - h[..., 2]
    reduction = refitted_subset(moments_of(h, C), 4)
    assert reduction.output_error < 1e-3


def test_all_states_are_the_scan_itself():
    h, C = scan_steps()
    reduction = refitted_subset(moments_of(h, C), 6)
    assert reduction.states.tolist() == list(range(6))
    assert reduction.output_error < 1e-6


def test_backward_removes_what_the_rest_predicts_cheapest():
    h, C = scan_steps(steps=3000)
    P, Q = moments_of(h, C).P, moments_of(h, C).Q
    states, mix = backward_subset(P, Q, 5)
    costs = []
    for gone in range(6):
        kept = [n for n in range(6) if n != gone]
        weight = torch.linalg.solve(P[kept][:, kept], P[kept, gone])
        unpredicted = P[gone, gone] - weight @ P[kept, gone]
        costs.append(float(unpredicted * Q[gone, gone]))
    gone = min(range(6), key=costs.__getitem__)
    kept = [n for n in range(6) if n != gone]
    assert states.tolist() == kept
    weight = torch.linalg.solve(P[kept][:, kept], P[kept, gone])
    expected = torch.zeros(5, 6, dtype=torch.float64)
    expected[range(5), kept] = 1
    expected[:, gone] = weight
    torch.testing.assert_close(mix, expected, rtol=1e-4, atol=1e-4)


def test_forward_is_orthogonal_least_squares():
    h, C = scan_steps(steps=500)
    z, target = (h * C[:, None, :]).flatten(0, 1), output(h, C).flatten()

    def residual(subset):
        coefficients = torch.linalg.lstsq(z[:, subset], target).solution
        return float((z[:, subset] @ coefficients - target).norm())

    chosen: list[int] = []
    for _ in range(3):
        chosen.append(min((n for n in range(6) if n not in chosen), key=lambda n: residual([*chosen, n])))
    assert forward_subset(moments_of(h, C), 3).tolist() == sorted(chosen)


def test_it_is_close_to_the_best_of_all_subsets():
    h, C = scan_steps()
    moments = moments_of(h, C)
    target = output(h, C)
    best = min(
        float((output(h[..., list(s)], C @ refitted_mix(moments, torch.tensor(s)).T) - target).norm() / target.norm())
        for s in itertools.combinations(range(6), 3)
    )
    assert refitted_subset(moments, 3).output_error <= 1.2 * best


def test_without_data_the_backward_map_serves():
    h, C = scan_steps()
    full = moments_of(h, C)
    blind = SelectiveMoments(full.P, full.Q, full.M[:0], full.C[:0], full.mean, full.B)
    reduction = refitted_subset(blind, 3)
    states, mix = backward_subset(full.P, full.Q, 3)
    assert torch.equal(reduction.states, states)
    assert torch.equal(reduction.mix, mix)
    assert reduction.output_error is None


@pytest.mark.parametrize("empty", ["P", "Q"])
def test_dead_scans_do_not_break(empty):
    h, C = scan_steps()
    if empty == "P":
        h = torch.zeros_like(h)
    else:
        C = torch.zeros_like(C)
    reduction = refitted_subset(moments_of(h, C), 2)
    assert torch.isfinite(reduction.mix).all()
    assert reduction.output_error == 0.0


@pytest.mark.parametrize("rank", [0, 7, True, 2.0])
@pytest.mark.parametrize("find", [refitted_subset, mean_subset])
def test_wrong_ranks(find, rank):
    with pytest.raises(ArgumentError, match=r"^rank: expected an integer from 1 to 6"):
        find(moments_of(*scan_steps(steps=10)), rank)
