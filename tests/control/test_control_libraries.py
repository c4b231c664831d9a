"""Control libraries as peers, where they are installed: pyMOR's balanced truncation, python-control's objects in and out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compressm.control import DiagonalSystem, sampled, truncation

pytestmark = pytest.mark.filterwarnings("default")  # of packages that are not ours
STEP = 0.1


def chain(masses: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masses in a row between springs and dampers, fixed at both ends, pushed at the first two, three positions measured."""
    K = 2 * np.eye(masses) - np.eye(masses, k=1) - np.eye(masses, k=-1)
    A = np.block([[np.zeros((masses, masses)), np.eye(masses)], [-K, -0.3 * K - 0.05 * np.eye(masses)]])
    return A, np.eye(2 * masses)[:, [masses, masses + 1]], np.eye(2 * masses)[[0, masses // 2, masses - 1]]


@pytest.fixture(scope="module")
def pymor_model():
    iosys = pytest.importorskip("pymor.models.iosys")
    from pymor.core.logger import set_log_levels

    set_log_levels({"pymor": "ERROR"})
    A, B, C, _ = sampled(*chain(), step=STEP).arrays()
    return iosys.LTIModel.from_matrices(A, B, C, sampling_time=STEP)


def test_hankel_singular_values_and_bounds_are_pymor_s(pymor_model):
    from pymor.models.iosys import LTIModel
    from pymor.reductors.bt import BTReductor

    hsv = DiagonalSystem.from_state_space(*chain(), step=STEP).hankel_singular_values()[:40].numpy()
    for model in (pymor_model, LTIModel.from_matrices(*chain())):  # the bilinear rule keeps them
        expected = model.hsv()
        np.testing.assert_allclose(hsv[:24], expected[:24], rtol=1e-6)
        np.testing.assert_allclose(hsv[: len(expected)], expected, rtol=1e-4, atol=1e-9 * expected[0])
    bounds = BTReductor(pymor_model).error_bounds()
    np.testing.assert_allclose(2 * hsv[::-1].cumsum()[::-1][1:25], bounds[:24], rtol=1e-4, atol=1e-9 * expected[0])


@pytest.mark.parametrize("order", [2, 5, 12])
def test_a_truncated_chain_answers_as_pymor_s(pymor_model, order):
    from pymor.reductors.bt import BTReductor

    reduced = BTReductor(pymor_model).reduce(order)
    ours = truncation(DiagonalSystem.from_state_space(*chain(), step=STEP), order)
    omega = torch.linspace(0, np.pi, 200, dtype=torch.float64)
    expected = np.stack([reduced.transfer_function.eval_tf(z) for z in np.exp(1j * omega.numpy())])
    np.testing.assert_allclose(ours.frequency_response(omega), expected, rtol=1e-6, atol=1e-8)


def test_python_control_s_objects_go_in_and_out():
    pytest.importorskip("control.statesp")  # the folder of these tests is called control as well
    import control

    A, B, C = chain(4)
    plant = control.ss(A, B, C, np.zeros((3, 2)))
    digital = control.sample_system(plant, STEP, method="zoh")
    system = DiagonalSystem.from_state_space(digital)
    held = DiagonalSystem.from_state_space(plant, step=STEP, method="zoh")
    torch.testing.assert_close(system.hankel_singular_values(), held.hankel_singular_values())
    small, everything = (control.ss(*model.arrays(), digital.dt) for model in (truncation(system, 6), system.to_state_space()))
    z = np.exp(1j * np.linspace(0, np.pi, 100))
    expected = digital(z)  # (outputs, inputs, frequencies)
    np.testing.assert_allclose(everything(z), expected, rtol=1e-7, atol=1e-10)
    error = np.linalg.norm((small(z) - expected).transpose(2, 0, 1), 2, axis=(1, 2)).max()
    assert error <= 2 * float(system.hankel_singular_values()[6:].sum())
