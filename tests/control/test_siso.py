"""Hankel singular values of many SISO systems: the closed-form factor, high precision, hard clusters."""

from __future__ import annotations

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressm.control import DiagonalSystem, siso_hankel_singular_values
from compressm.control.siso import szego_factor
from compressm.errors import ArgumentError


def high_precision(log_lam, gain):
    """sqrt(eig(P Q)) in 60 digits, descending."""
    with mpmath.workdps(60):
        n = len(log_lam)
        a = [mpmath.exp(mpmath.mpf(float(x))) for x in log_lam]
        g = [mpmath.mpf(float(x)) for x in gain]
        P = mpmath.matrix(n, n)
        Q = mpmath.matrix(n, n)
        for i in range(n):
            for j in range(n):
                P[i, j] = g[i] * g[j] / (1 - a[i] * a[j])
                Q[i, j] = 1 / (1 - a[i] * a[j])
        values = mpmath.eig(P * Q, left=False, right=False)
        return sorted((float(mpmath.sqrt(abs(v))) for v in values), reverse=True)


@pytest.mark.parametrize(
    "a", [[0.1, 0.5, 0.9, 0.99, 0.999, 0.9999], [0.9, 0.901, 0.902, 0.903, 0.904, 0.905]], ids=["spread", "clustered"]
)
def test_relative_accuracy_of_the_smallest(a):
    log_lam = torch.tensor(a, dtype=torch.float64).log()
    gain = torch.tensor([1.0, -2.0, 0.5, 1.5, -0.3, 0.7], dtype=torch.float64)
    expected = torch.tensor(high_precision(log_lam, gain), dtype=torch.float64)
    values = siso_hankel_singular_values(log_lam, gain)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-16 * float(expected[0]))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 4), st.sampled_from(["random", "duplicate", "slow"]), st.integers(0, 2**31)
)
def test_it_is_the_spectrum_of_the_system(order, batch, kind, seed):
    draw = torch.Generator().manual_seed(seed)
    log_lam = -torch.rand(batch, order, generator=draw, dtype=torch.float64) - 1e-3
    if kind == "duplicate":
        log_lam[:, order // 2 :] = log_lam[:, :1]
    if kind == "slow":
        log_lam = log_lam * 1e-6
    b, c = torch.randn(2, batch, order, generator=draw, dtype=torch.float64)
    values = siso_hankel_singular_values(log_lam, b * c)
    assert bool((values[:, :-1] >= values[:, 1:]).all())
    for i in range(batch):
        system = DiagonalSystem(log_lam[i], b[i, :, None], c[i, None, :])
        expected = system.hankel_singular_values("complex")
        torch.testing.assert_close(values[i], expected, rtol=1e-6, atol=1e-8 * float(expected[0]))


def test_the_factor_is_exact_and_short():
    log_lam = -torch.arange(1.0, 129.0, dtype=torch.float64) * torch.tensor([[1e-3], [1e-1]], dtype=torch.float64)
    L = szego_factor(log_lam)
    K = 1 / -torch.expm1(log_lam[:, :, None] + log_lam[:, None, :])
    assert bool(((L @ L.mT - K).abs() <= 1e-13 * K).all())
    assert L.shape[-1] < 48


def test_no_gain_no_values():
    values = siso_hankel_singular_values(torch.full((2, 5), -0.1), torch.zeros(2, 5))
    assert torch.equal(values, torch.zeros(2, 5, dtype=torch.float64))


@pytest.mark.parametrize("gain", [torch.zeros(2, 3), torch.zeros(2, 5, dtype=torch.cfloat)])
def test_wrong_tensors(gain):
    with pytest.raises(ArgumentError, match=r"^log_lam, gain: expected two real tensors"):
        siso_hankel_singular_values(torch.full((2, 5), -0.1), gain)
