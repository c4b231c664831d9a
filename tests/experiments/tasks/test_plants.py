"""Simulated plants: their physics, and that a model of their order is found in training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from compressm.control import DiagonalSystem, sampled, subspace_identification
from compressm.errors import ConfigError, DataError
from compressm.experiments.methods.subspace import identified
from compressm.experiments.settings import resolve
from compressm.experiments.tasks.datasets import DATASETS
from compressm.experiments.tasks.datasets.plants import GRAVITY, arm, chain
from compressm.experiments.tasks.datasets.signals import SEED

TINY = {"sequences": 20, "length": 25}


def load(**overrides):
    return DATASETS["plant"](resolve("plant", {**TINY, **overrides})).load(None)


def test_a_row_of_springs_is_at_rest_where_forces_balance():
    A, B, C = (matrix.numpy() for matrix in chain(3, torch.Generator().manual_seed(0)))
    still = -np.linalg.solve(A, B @ np.ones(3))
    assert np.allclose(still[3:], 0)
    stiffness = -A[3:, :3] * (1 / np.diag(B[3:]))[:, None]
    assert np.allclose(stiffness, stiffness.T)
    assert (np.linalg.eigvalsh(stiffness) > 0).all()
    assert np.allclose(stiffness[0, 2], 0)
    assert np.linalg.eigvals(A).real.max() < 0
    assert (C @ still > 0).all()


def test_the_signals_are_the_plant_s():
    data = load(noise=0.0, seed=2)
    model = sampled(*chain(4, torch.Generator().manual_seed(SEED + 2)), step=0.3, method="zoh")
    response = DiagonalSystem.from_state_space(model).impulse_response(25).real.float()
    for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        expected = torch.stack([sum(x[:, t - s] @ response[s].T for s in range(t + 1)) for t in range(25)], 1)
        scale = (y * expected).sum((0, 1)) / expected.square().sum((0, 1))
        torch.testing.assert_close(y, scale * expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(load(seed=1).test_y, load(seed=1).test_y)
    assert not torch.equal(load(seed=1).test_y, load(seed=2).test_y)
    assert not torch.equal(load(seed=2).train_y, data.train_y)


def test_the_arm_swings_by_the_equations_of_lagrange():
    """After a push at the first joint, with masses and forces from the derivatives of the positions, by scipy."""
    settings = resolve("plant", {"plant": "arm", "channels": 2, "sampling": 0.05})
    draw = torch.Generator().manual_seed(3)
    simulate = arm(settings, draw)
    again = torch.Generator().manual_seed(3)
    m1, m2 = (0.5 + torch.rand(2, generator=again)).tolist()
    l1, l2 = (0.5 + 0.5 * torch.rand(2, generator=again)).tolist()
    c1, c2 = (0.2 + 0.3 * torch.rand(2, generator=again)).tolist()
    push = 150.0

    def position(q):
        x1 = np.array([l1 * np.sin(q[0]), -l1 * np.cos(q[0])])
        return x1, x1 + np.array([l2 * np.sin(q[0] + q[1]), -l2 * np.cos(q[0] + q[1])])

    def jacobians(q):
        step = 1e-6
        pairs = [(position(q + step * e), position(q - step * e)) for e in np.eye(2)]
        return [np.stack([(after[k] - before[k]) / (2 * step) for after, before in pairs], 1) for k in range(2)]

    def mass(q):
        return sum(m * J.T @ J for m, J in zip((m1, m2), jacobians(q), strict=True))

    def weight(q):
        return sum(m * GRAVITY * J[1] for m, J in zip((m1, m2), jacobians(q), strict=True))

    def slope(t, z):
        q, v, h = z[:2], z[2:], 1e-5
        drift = (mass(q + h * v) - mass(q - h * v)) / (2 * h) @ v  # of M(q) v with the time
        pull = np.array([v @ (mass(q + h * e) - mass(q - h * e)) @ v / (4 * h) for e in np.eye(2)])
        torque = np.array([push * 0.05 * GRAVITY * m2 * l2 if t < 0.05 else 0.0, 0.0])
        return [*v, *np.linalg.solve(mass(q), torque - np.array([c1, c2]) * v - drift + pull - weight(q))]

    x = torch.zeros(1, 8, 2)
    x[0, 0, 0] = push
    first = solve_ivp(slope, (0, 0.05), np.zeros(4), rtol=1e-7, atol=1e-9)
    rest = solve_ivp(slope, (0.05, 0.4), first.y[:, -1], t_eval=0.05 * np.arange(1, 9), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(simulate(x)[0].numpy(), rest.y[:2].T, rtol=5e-3, atol=5e-4)
    assert float(simulate(x).abs().max()) > 0.3


def test_least_squares_finds_a_plant_and_its_order():
    data = load(sequences=120, length=100)
    system, skip = identified(data.train_x, data.train_y, 4)
    assert system.order == 4
    found, x = system.impulse_response(100).real.float(), data.test_x
    y = torch.stack([sum(x[:, t - s] @ found[s].T for s in range(t + 1)) + x[:, t] * skip for t in range(100)], 1)
    error = (y - data.test_y).square().sum() / data.test_y.square().sum()
    assert 10 * math.log10(float(error)) < -25
    with pytest.raises(DataError, match="windows"):
        subspace_identification(data.train_x[:2], data.train_y[:2], 8)


def test_wrong_settings(tmp_path):
    with pytest.raises(DataError, match="expected no folder, as 'plant' is simulated"):
        DATASETS["plant"](resolve("plant", TINY)).load(tmp_path)
    with pytest.raises(DataError, match="an arm of two links has 2"):
        load(plant="arm")
    with pytest.raises(ConfigError, match="blocks = 2 must be 1 for 'subspace'"):
        resolve("plant", {"blocks": 2})
    with pytest.raises(ConfigError, match="spectrum_weight must be 0"):
        resolve("recall", {"spectrum_weight": 0.1})
