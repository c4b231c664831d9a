"""Criteria that rank single modes, each against what it stands for."""

from __future__ import annotations

import math

import pytest
import torch

from compressm.control import (
    AIRE,
    LAST,
    DiagonalSystem,
    ImpulseEnergy,
    Magnitude,
    Modulus,
    PeakGain,
    RandomModes,
    best_modes,
    keep_modes,
)
from compressm.errors import ArgumentError

N = 5


@pytest.fixture
def system():
    random = torch.Generator().manual_seed(3)
    decay = -0.02 - 0.3 * torch.rand(N, generator=random, dtype=torch.float64)
    phase = math.pi * torch.rand(N, generator=random, dtype=torch.float64)
    B = torch.randn(N, 2, generator=random, dtype=torch.complex128)
    C = torch.randn(3, N, generator=random, dtype=torch.complex128)
    return DiagonalSystem(torch.complex(decay, phase), B, C)


def single(system, mode):
    part = slice(mode, mode + 1)
    return DiagonalSystem(system.log_lam[part], system.B[part], system.C[:, part])


def test_peak_gain_is_the_largest_gain_of_a_mode_over_all_frequencies(system):
    for mode, score in enumerate(PeakGain().scores(system).tolist()):
        response = single(system, mode).frequency_response(system.log_lam[mode : mode + 1].imag)
        assert math.isclose(float(torch.linalg.matrix_norm(response[0], 2)), score, rel_tol=1e-12)
        elsewhere = single(system, mode).frequency_response(torch.linspace(0, 6.28, 50))
        assert float(torch.linalg.matrix_norm(elsewhere, 2).max()) <= score * (1 + 1e-12)


def test_impulse_energy_is_that_of_the_impulse_response(system):
    for mode, score in enumerate(ImpulseEnergy().scores(system).tolist()):
        response = single(system, mode).impulse_response(3000)
        assert math.isclose(float(torch.linalg.vector_norm(response)), score, rel_tol=1e-9)


def test_no_criterion_depends_on_the_scale_of_a_state(system):
    scale = torch.tensor([1e-3, 1.0, 2j, 1e4, -1.0], dtype=torch.complex128)
    other = DiagonalSystem(system.log_lam, scale[:, None] * system.B, system.C / scale)
    for criterion in (Magnitude(), PeakGain(), ImpulseEnergy(), Modulus(), LAST(), AIRE(), RandomModes(2)):
        torch.testing.assert_close(criterion.scores(other), criterion.scores(system))


def test_the_criteria_rank_differently():
    log_lam = torch.tensor([-1e-3, -0.1, -3.0]).to(torch.complex128)
    gains = torch.tensor([0.02, 0.4, 1.0]).to(torch.complex128)
    system = DiagonalSystem(log_lam, gains[:, None], torch.ones(1, 3, dtype=torch.complex128))
    order = {type(c): c.scores(system).argsort(descending=True).tolist() for c in (Magnitude(), PeakGain(), ImpulseEnergy())}
    assert order == {Magnitude: [2, 1, 0], PeakGain: [0, 1, 2], ImpulseEnergy: [2, 1, 0]}
    assert best_modes(PeakGain().scores(system), 2).tolist() == [0, 1]
    assert best_modes(torch.zeros(4), 3).tolist() == [0, 1, 2]  # the first of equals
    with pytest.raises(ArgumentError, match="rank"):
        best_modes(torch.zeros(3), 4)


@pytest.mark.parametrize(("criterion", "power"), [(LAST(), 1), (AIRE(), 2)])
def test_scores_that_layers_share_are_shares_of_what_is_larger(system, criterion, power):
    lam = system.log_lam.exp().abs()
    plain = system.B.abs().square().sum(1) * system.C.abs().square().sum(0) / (1 - lam**power) ** (2 / power)
    expected = [float(own / plain[plain >= own].sum()) for own in plain]
    torch.testing.assert_close(criterion.scores(system), torch.tensor(expected, dtype=torch.float64))
    assert criterion.scores(system).max() == 1.0
    louder = DiagonalSystem(system.log_lam, 1e3 * system.B, system.C)
    torch.testing.assert_close(criterion.scores(louder), criterion.scores(system))
    assert criterion.scores(DiagonalSystem(system.log_lam, 0 * system.B, system.C)).tolist() == [0.0] * N


def test_the_modulus_is_that_of_the_eigenvalue(system):
    torch.testing.assert_close(Modulus().scores(system), system.log_lam.exp().abs())


def test_kept_modes_are_a_part_of_the_system(system):
    modes = torch.tensor([0, 2, 3])
    reduction = keep_modes(system, modes, "some")
    rest = [mode for mode in range(N) if mode not in modes.tolist()]
    whole = system.impulse_response(20) - sum(single(system, mode).impulse_response(20) for mode in rest)
    torch.testing.assert_close(reduction.system.impulse_response(20), whole)
    assert (reduction.order, reduction.real_order, reduction.method) == (3, 3, "some")
    assert reduction.kept(N).tolist() == [0, 2, 3]
    torch.testing.assert_close(reduction.left @ reduction.right, torch.eye(3, dtype=torch.complex128))


def test_chance_is_reproducible_and_differs_by_seed(system):
    first, again, other = (RandomModes(seed).scores(system) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
