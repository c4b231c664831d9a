"""Models of control theory: SLICOT's example, interchange, both reductions and their bounds, weighted Gramians."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, signal

from compressm.control import (
    DiagonalSystem,
    balance,
    frequency_weighted_gramians,
    real_gramians,
    sampled,
    singular_perturbation,
    time_limited_gramians,
    truncation,
)
from compressm.control.coordinates import Coordinates
from compressm.control.weighted_gramians import lyapunov
from compressm.errors import ArgumentError, NumericalError

# A two-area power system, the example of SLICOT's AB09AD (SLICOT-Reference, BSD-3), with the values that it prints.
POWER = (
    np.array([
        [-0.04165, 0, 4.92, -4.92, 0, 0, 0],
        [-5.21, -12.5, 0, 0, 0, 0, 0],
        [0, 3.33, -3.33, 0, 0, 0, 0],
        [0.545, 0, 0, 0, -0.545, 0, 0],
        [0, 0, 0, 4.92, -0.04165, 0, 4.92],
        [0, 0, 0, 0, -5.21, -12.5, 0],
        [0, 0, 0, 0, 0, 3.33, -3.33],
    ]),
    np.array([[0, 0], [12.5, 0], [0, 0], [0, 0], [0, 0], [0, 12.5], [0, 0]]),
    np.array([[1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0]]),
)  # fmt: skip
PRINTED = [2.5139, 2.0846, 1.9178, 0.7666, 0.5473, 0.0253, 0.0246]
GRID = torch.cat([torch.zeros(1), torch.logspace(-4, 0, 400), torch.linspace(1, np.pi, 300)]).double()


def springs(masses: int = 5):
    """Masses in a row between springs and dampers, pushed at the first one, all positions measured."""
    K = 2 * np.eye(masses) - np.eye(masses, k=1) - np.eye(masses, k=-1)
    A = np.block([[np.zeros((masses, masses)), np.eye(masses)], [-K, -0.3 * K - 0.05 * np.eye(masses)]])
    B = np.zeros((2 * masses, 1))
    B[masses] = 1
    return A, B, np.eye(masses, 2 * masses)


def gain(difference: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(difference, 2).max())


@pytest.mark.parametrize("step", [0.01, 0.3])
def test_slicot(step):
    system = DiagonalSystem.from_state_space(*POWER, step=step)
    hsv = system.hankel_singular_values()
    assert [round(value, 4) for value in hsv[:7].tolist()] == PRINTED
    assert float(hsv[7:].abs().max()) < 1e-10
    order = int((hsv > 0.1).sum())
    assert order == 5
    full = system.to_state_space().frequency_response(GRID)
    for reduce in (truncation, singular_perturbation):
        error = gain(full - reduce(system, order).frequency_response(GRID))
        assert float(hsv[5]) <= error <= 2 * float(hsv[5:].sum())


def test_a_chain_of_springs_has_scipy_s_gramians():
    A, B, C = springs()
    P, Q = (linalg.solve_continuous_lyapunov(M, -R) for M, R in ((A, B @ B.T), (A.T, C.T @ C)))
    oracle = np.sqrt(np.sort(np.linalg.eigvals(P @ Q).real)[::-1])
    hsv = DiagonalSystem.from_state_space(A, B, C, step=0.1).hankel_singular_values()
    np.testing.assert_allclose(hsv[:10], oracle, rtol=1e-6)


@pytest.mark.parametrize("method", ["bilinear", "zoh"])
def test_continuous_time_is_sampled_as_scipy_samples_it(method):
    A, B, C = springs()
    step = 0.2
    Ad, Bd, Cd, _, _ = signal.cont2discrete((A, B, C, np.zeros((5, 1))), step, method=method)
    D = np.ones((5, 1))
    model = sampled(A, B, C, D, step=step, method=method)
    full = signal.StateSpace(*signal.cont2discrete((A, B, C, D), step, method=method)[:4], dt=step)
    _, impulse = signal.dimpulse(full, n=30)
    np.testing.assert_allclose(signal.dimpulse(signal.StateSpace(*model.arrays(), dt=step), n=30)[1][0], impulse[0], atol=1e-12)
    torch.testing.assert_close(
        DiagonalSystem.from_state_space(model).impulse_response(30).real,
        DiagonalSystem.from_state_space(A, B, C, step=step, method=method).impulse_response(30).real,
    )
    z = np.exp(1j * GRID.numpy())
    oracle = np.stack([Cd @ np.linalg.solve(w * np.eye(10) - Ad, Bd) for w in z])
    found = DiagonalSystem.from_state_space(A, B, C, step=step, method=method).to_state_space().frequency_response(GRID)
    torch.testing.assert_close(found, torch.from_numpy(oracle), rtol=1e-9, atol=1e-9)


def test_in_and_out_of_other_libraries():
    """scipy's objects, and those with python-control's attributes: dt is 0 in continuous and may be True in discrete time."""
    A, B, C = springs()
    D = np.zeros((5, 1))
    expected = DiagonalSystem.from_state_space(A, B, C, step=0.2).hankel_singular_values()
    sampled = signal.cont2discrete((A, B, C, D), 0.2, method="zoh")
    for continuous in (signal.StateSpace(A, B, C, D), SimpleNamespace(A=A, B=B, C=C, D=D, dt=0)):
        hsv = DiagonalSystem.from_state_space(continuous, step=0.2).hankel_singular_values()
        torch.testing.assert_close(hsv, expected)
        with pytest.raises(ArgumentError, match="step: expected the step to sample"):
            DiagonalSystem.from_state_space(continuous)
    for dt in (0.2, True):
        discrete = SimpleNamespace(A=sampled[0], B=sampled[1], C=sampled[2], D=D, dt=dt)
        out = DiagonalSystem.from_state_space(discrete).to_state_space()
        back = signal.StateSpace(*out.arrays(), dt=0.2)
        _, impulse = signal.dimpulse((sampled[0], sampled[1], sampled[2], D, 0.2), n=30)
        np.testing.assert_allclose(signal.dimpulse(back, n=30)[1][0], impulse[0], atol=1e-10)
        with pytest.raises(ArgumentError, match="step: expected None"):
            DiagonalSystem.from_state_space(discrete, step=0.2)


def test_the_system_says_the_model_s_output_one_step_early():
    A, B, C = (torch.from_numpy(m) for m in springs())
    Ad = torch.linalg.matrix_exp(0.2 * A)
    system = DiagonalSystem.from_state_space(Ad, B, C)
    impulse = torch.stack([C @ torch.linalg.matrix_power(Ad, t) @ B for t in range(20)])
    torch.testing.assert_close(system.impulse_response(20).real, impulse)
    assert system.order == 5


def test_round_trip():
    lam = torch.tensor([0.9 * np.exp(0.5j), 0.5, -0.7, 0.3 * np.exp(2j)], dtype=torch.complex128)
    system = DiagonalSystem.from_lam(lam, torch.randn(4, 2, dtype=torch.complex128), torch.randn(3, 4, dtype=torch.complex128))
    out = system.to_state_space()
    assert [tuple(m.shape) for m in out] == [(8, 8), (8, 2), (3, 8), (3, 2)]
    again = DiagonalSystem.from_state_space(*out[:3])
    torch.testing.assert_close(again.impulse_response(30).real, system.impulse_response(30).real)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(1, 3), st.integers(1, 3), st.data())
def test_no_reduction_beats_hankel_s_bound_and_none_exceeds_twice_the_tail(seed, modes, inputs, outputs, data):
    draw = torch.Generator().manual_seed(seed)
    decay, phase = -0.05 - torch.rand(modes, generator=draw), 3 * torch.rand(modes, generator=draw)
    B, C = torch.randn(modes, inputs, generator=draw), torch.randn(outputs, modes, generator=draw)
    system = DiagonalSystem(torch.complex(decay, phase), B, C)
    hsv = balance(system).hsv
    order = data.draw(st.integers(1, len(balance(system).bases[0]) - 1))
    omega = torch.linspace(0, np.pi, 2000, dtype=torch.float64)
    full = system.to_state_space().frequency_response(omega)
    for reduce in (truncation, singular_perturbation):
        small = reduce(system, order)
        error = gain(full - small.frequency_response(omega))
        assert float(torch.linalg.eigvals(small.A).abs().max()) < 1
        assert error <= 2 * float(hsv[order:].sum()) * (1 + 1e-9) + 1e-9
        assert error >= float(hsv[order]) * (1 - 1e-3) - 1e-9


def test_singular_perturbation_is_exact_at_frequency_zero():
    system = DiagonalSystem.from_state_space(*POWER, step=0.3)
    zero = torch.zeros(1, dtype=torch.float64)
    full, hsv = system.to_state_space().frequency_response(zero), system.hankel_singular_values()
    small = singular_perturbation(system, 3)
    torch.testing.assert_close(small.frequency_response(zero), full, rtol=1e-9, atol=1e-9)
    assert gain(truncation(system, 3).frequency_response(zero) - full) > 1e-3
    P = lyapunov(small.A, small.B @ small.B.T)
    torch.testing.assert_close(P, torch.diag(hsv[:3]), rtol=1e-8, atol=1e-8)
    everything = singular_perturbation(system, len(balance(system).bases[0]))
    torch.testing.assert_close(everything.frequency_response(GRID), system.to_state_space().frequency_response(GRID))


def some_system(modes=4, inputs=2, outputs=3) -> DiagonalSystem:
    decay, phase = -0.05 - torch.rand(modes), 3 * torch.rand(modes)
    B, C = torch.randn(modes, inputs, dtype=torch.cfloat), torch.randn(outputs, modes, dtype=torch.cfloat)
    return DiagonalSystem(torch.complex(decay, phase), B, C)


@pytest.mark.parametrize("steps", [1, 3, 40, 10_000])
def test_time_limited_gramians_are_sums_over_steps(steps):
    system = some_system()
    at = Coordinates.of(system, "real")
    P, Q, power = torch.zeros_like(at.A), torch.zeros_like(at.A), torch.eye(8, dtype=torch.float64)
    for _ in range(min(steps, 600)):
        P, Q = P + power @ at.B @ (power @ at.B).T, Q + (at.C @ power).T @ at.C @ power
        power = at.A @ power
    found = time_limited_gramians(system, steps)
    torch.testing.assert_close(found[0], P, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[1], Q, rtol=1e-10, atol=1e-12)
    assert balance(system, P=found[0], Q=found[1], fallback_Q=real_gramians(system)[1]).reduce(2).order == 2


def test_frequency_weighted_gramians_are_those_of_the_cascade():
    system, first, last = some_system(), some_system(3, 1, 2), some_system(2, 3, 2)
    P, Q = frequency_weighted_gramians(system, input_weight=first, output_weight=last)
    at, shape, hear = (Coordinates.of(s, "real") for s in (system, first, last))
    states, x, w = [], torch.zeros(8, 1, dtype=torch.float64), shape.B.clone()
    for _ in range(600):  # states after an impulse of the noise
        x = at.A @ x + at.B @ shape.C @ w
        states.append(x)
        w = shape.A @ w
    states = torch.cat(states, 1)
    torch.testing.assert_close(P, states @ states.T, rtol=1e-9, atol=1e-11)
    heard, power, v = [], torch.eye(8, dtype=torch.float64), torch.zeros(4, 8, dtype=torch.float64)
    for _ in range(600):  # what the filter says of every initial state
        v = hear.A @ v + hear.B @ at.C @ power
        heard.append(hear.C @ v)
        power = at.A @ power
    heard = torch.cat(heard)
    torch.testing.assert_close(Q, heard.T @ heard, rtol=1e-9, atol=1e-11)
    for found, expected in zip(frequency_weighted_gramians(system), real_gramians(system), strict=True):
        torch.testing.assert_close(found, expected)


def test_lyapunov_near_the_unit_circle():
    A = torch.diag(torch.tensor([1 - 1e-7, -0.5], dtype=torch.float64))
    M = torch.ones(2, 2, dtype=torch.float64)
    oracle = torch.from_numpy(linalg.solve_discrete_lyapunov(A.numpy(), M.numpy()))
    torch.testing.assert_close(lyapunov(A, M), oracle, rtol=1e-8, atol=0)


def test_wrong_models():
    A, B, C = springs()
    with pytest.raises(ArgumentError, match=r"A, B, C, D: expected \(n, n\)"):
        DiagonalSystem.from_state_space(A, B.T, C)
    with pytest.raises(ArgumentError, match="B: expected a real matrix"):
        DiagonalSystem.from_state_space(A, 1j * B, C)
    with pytest.raises(ArgumentError, match="C: expected a real matrix"):
        DiagonalSystem.from_state_space(A, B)
    with pytest.raises(ArgumentError, match="method: expected 'bilinear' or 'zoh'"):
        DiagonalSystem.from_state_space(A, B, C, step=0.1, method="euler")
    with pytest.raises(ArgumentError, match="step: expected a positive number"):
        DiagonalSystem.from_state_space(A, B, C, step=-0.1)
    with pytest.raises(NumericalError, match=r"A: its eigenvectors have condition .*not diagonalisable"):
        DiagonalSystem.from_state_space([[0.5, 1], [0, 0.5]], [[1], [1]], [[1, 0]])
    with pytest.raises(NumericalError, match="unit circle"):
        DiagonalSystem.from_state_space(2 * np.eye(2), np.eye(2), np.eye(2))
    with pytest.raises(NumericalError, match="negative real parts"):
        DiagonalSystem.from_state_space(np.eye(2), np.eye(2), np.eye(2), step=0.1)
    with pytest.raises(NumericalError, match="A holds NaN"):
        DiagonalSystem.from_state_space(np.nan * A, B, C)
    system = some_system()
    with pytest.raises(ArgumentError, match="order: expected an integer from 1 to 8"):
        truncation(system, 9)
    with pytest.raises(ArgumentError, match="the real convention"):
        singular_perturbation(balance(system, "complex"), 2)
    with pytest.raises(ArgumentError, match="steps: expected a positive integer"):
        time_limited_gramians(system, 0)
    with pytest.raises(ArgumentError, match="input_weight: expected 2 outputs"):
        frequency_weighted_gramians(system, input_weight=some_system(outputs=3))
    with pytest.raises(ArgumentError, match="output_weight: expected 3 inputs"):
        frequency_weighted_gramians(system, output_weight=some_system(inputs=2))
