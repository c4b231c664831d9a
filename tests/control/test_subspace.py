"""Subspace identification finds the system that made the signals."""

from __future__ import annotations

import pytest
import torch
from scipy import signal

from compressm.control import DiagonalSystem, StateSpace, subspace_identification
from compressm.errors import ArgumentError, DataError


def some_model(order=4, inputs=2, outputs=3) -> StateSpace:
    log_lam = torch.complex(-0.1 - 0.3 * torch.rand(order // 2), 0.3 + 2 * torch.rand(order // 2))
    B, C = torch.randn(order // 2, inputs, dtype=torch.cfloat), torch.randn(outputs, order // 2, dtype=torch.cfloat)
    return DiagonalSystem(log_lam, B, C).to_state_space()._replace(D=torch.randn(outputs, inputs, dtype=torch.float64))


def signals(model: StateSpace, sequences=20, length=120, noise=0.0):
    u = torch.randn(sequences, length, model.B.shape[1], dtype=torch.float64)
    y = torch.stack([torch.from_numpy(signal.dlsim(signal.StateSpace(*model.arrays(), dt=1), one.numpy())[1]) for one in u])
    return u, y + noise * torch.randn_like(y)


OMEGA = torch.linspace(0, 3.14, 60, dtype=torch.float64)


@pytest.mark.parametrize("sequences", [20, 1])
def test_without_noise_the_system_is_found(sequences):
    model = some_model()
    u, y = signals(model, sequences, 3000 if sequences == 1 else 120)
    found = subspace_identification(u, y, 4, past=15, future=6)
    torch.testing.assert_close(found.frequency_response(OMEGA), model.frequency_response(OMEGA), rtol=1e-4, atol=1e-4)
    if sequences == 1:
        again = subspace_identification(u[0], y[0], 4, past=15, future=6)
        torch.testing.assert_close(again.frequency_response(OMEGA), found.frequency_response(OMEGA))


def test_with_noise_it_is_found_roughly_and_a_smaller_one_is_worse():
    model = some_model()
    u, y = signals(model, 40, noise=0.05)
    truth = model.frequency_response(OMEGA)

    def error(order):
        found = subspace_identification(u, y, order, past=15, future=6).frequency_response(OMEGA)
        return float((found - truth).norm() / truth.norm())

    assert error(4) < 0.05
    assert error(2) > 3 * error(4)


def test_wrong_signals():
    u, y = torch.randn(2, 50, 1), torch.randn(2, 50, 2)
    with pytest.raises(ArgumentError, match="u, y: expected"):
        subspace_identification(u, y[:, :40], 2)
    with pytest.raises(ArgumentError, match="order: expected 1 to 40"):
        subspace_identification(u, y, 41)
    with pytest.raises(DataError, match="windows of 41 steps, expected at least"):
        subspace_identification(u, y, 2)
    with pytest.raises(DataError, match="0 windows"):
        subspace_identification(u[:, :30], y[:, :30], 2)
