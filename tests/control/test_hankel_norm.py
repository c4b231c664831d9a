"""The Hankel nuclear norm as a loss: its value and its gradient."""

from __future__ import annotations

import math

import pytest
import torch

from compressm.control import DiagonalSystem, hankel_nuclear_norm, real_gramians


def draw(n, *, equal=False):
    random = torch.Generator().manual_seed(n)
    decay = 0.05 + 0.4 * torch.rand(n, generator=random, dtype=torch.float64)
    phase = math.pi * torch.rand(n, generator=random, dtype=torch.float64)
    if equal:
        decay, phase = decay[:1].repeat(n), phase[:1].repeat(n)
    B, C = (torch.randn(shape, generator=random, dtype=torch.complex128) for shape in ((n, 2), (3, n)))
    return [t.requires_grad_() for t in (torch.complex(-decay, phase), B, C)]


@pytest.mark.parametrize("n", [1, 5, 13])
def test_it_is_the_sum_of_the_hankel_singular_values(n):
    parts = draw(n)
    expected = DiagonalSystem(*parts).hankel_singular_values().sum()
    torch.testing.assert_close(hankel_nuclear_norm(*parts), expected, rtol=1e-11, atol=0.0)


@pytest.mark.parametrize("n", [1, 4])
def test_its_gradient_is_that_of_the_sum(n):
    parts = draw(n)
    assert torch.autograd.gradcheck(hankel_nuclear_norm, parts)


def test_its_gradient_is_that_of_eigenvalues_of_the_product_of_gramians():
    parts = draw(3)
    mine = torch.autograd.grad(hankel_nuclear_norm(*parts), parts)
    values = [t.detach().clone().requires_grad_() for t in parts]
    log_lam, B, C = values
    lam = log_lam.exp()
    P = B @ B.mH / (1 - lam[:, None] * lam.conj()[None, :])
    S = B @ B.mT / (1 - lam[:, None] * lam[None, :])
    Q = C.mH @ C / (1 - lam.conj()[:, None] * lam[None, :])
    S_Q = C.mH @ C.conj() / (1 - lam.conj()[:, None] * lam.conj()[None, :])

    def real(P, S):
        off = (S - P).imag
        return 0.5 * torch.cat([torch.cat([(P + S).real, off], 1), torch.cat([off.mT, (P - S).real], 1)])

    checked = real_gramians(DiagonalSystem(*parts))
    torch.testing.assert_close(real(P, S), checked[0])
    torch.testing.assert_close(real(Q, S_Q), checked[1])
    total = torch.linalg.eigvals(real(P, S) @ real(Q, S_Q)).real.sqrt().sum()
    for a, b in zip(mine, torch.autograd.grad(total, values), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_gradients_are_finite_where_values_coincide_or_vanish():
    parts = draw(4, equal=True)
    for gradient in torch.autograd.grad(hankel_nuclear_norm(*parts), parts):
        assert torch.isfinite(torch.view_as_real(gradient)).all()
    log_lam, B, C = draw(3)
    norm = hankel_nuclear_norm(log_lam, B, torch.zeros_like(C))
    assert norm.item() == 0.0
