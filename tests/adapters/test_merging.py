"""Eigenvalues that merge: what is read, cut and carried to moments stays finite and right, or is refused."""

from __future__ import annotations

import math

import pytest
import torch

from compressm.adapters import LRUAdapter
from compressm.control import DiagonalSystem
from compressm.control.balancing import MAX_CONDITION
from compressm.errors import NumericalError
from compressm.layers import LRU


def layer_with(gap: float, defect: bool) -> LRU:
    """Two real modes ``gap`` apart in front of three weak ones; of opposite gains that grow as they merge, or independent."""
    torch.manual_seed(1)
    layer = LRU(3, 5, dtype=torch.float64)
    with torch.no_grad():
        layer.nu_log.copy_((-torch.tensor([0.8, 0.8 + gap, 0.5, 0.6, 0.7], dtype=torch.float64).log()).log())
        layer.theta_log.copy_(torch.tensor([2 * math.pi, 2 * math.pi, 1.0, 2.0, 2.5], dtype=torch.float64).log())
        for weight in (layer.C_re, layer.C_im):
            weight[:, 2:] *= 1e-3
        layer.B_im[:2] = layer.C_im[:, :2] = 0
        if defect:
            layer.gamma_log[1] = layer.gamma_log[0]
            layer.B_re[1] = layer.B_re[0]
            layer.C_re[:, 0] /= gap
            layer.C_re[:, 1] = -layer.C_re[:, 0]
    return layer


def carried(layer: LRU):
    """The reduction to two states, and gradients of a loss carried over as first and second moments."""
    adapter = LRUAdapter()
    reduction = adapter.analyse(layer, "", "real", None).reduce(2)
    edit = adapter.edit(layer, reduction)
    layer(torch.ones(2, 30, 3, dtype=torch.float64)).square().sum().backward()
    gradients = {key: layer.get_parameter(key).grad for key in adapter.parameters(layer)}
    return reduction, edit, edit.first_moments(gradients), edit.second_moments({k: g.square() for k, g in gradients.items()})


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-12, 0.0])
def test_independent_modes_that_merge_change_nothing(gap):
    _, _, limit, _ = carried(layer_with(1e-5, defect=False))
    reduction, edit, first, second = carried(layer_with(gap, defect=False))
    assert reduction.method == "balanced"
    assert reduction.condition < 10
    full = LRUAdapter().read(layer_with(gap, defect=False)).impulse_response(40).real
    assert float((reduction.system.impulse_response(40).real - full).norm() / full.norm()) < 1e-2
    for key, moment in first.items():
        assert torch.isfinite(moment).all()
        assert torch.isfinite(second[key]).all()
        assert (second[key] >= 0).all()
        assert edit.tensors[key].isfinite().all()
        assert float(moment.norm()) == pytest.approx(float(limit[key].norm()), rel=0.2, abs=1e-6)


@pytest.mark.parametrize("gap", [1e-2, 1e-3, 1e-5])
def test_modes_that_merge_into_a_defect_are_cut_within_the_guard(gap):
    reduction, _, first, second = carried(layer_with(gap, defect=True))
    assert reduction.condition <= MAX_CONDITION
    full = LRUAdapter().read(layer_with(gap, defect=True)).impulse_response(40).real
    assert float((reduction.system.impulse_response(40).real - full).norm() / full.norm()) < 0.5
    assert all(bool(moment.isfinite().all()) for moment in (*first.values(), *second.values()))


@pytest.mark.parametrize("gap", [1e-2, 1e-5, 1e-7])
def test_a_model_near_a_defect_keeps_the_digits_that_are_left(gap):
    A, B, C = [[0.8, 1.0], [0.0, 0.8 + gap]], [[0.0], [1.0]], [[1.0, 0.0]]
    system = DiagonalSystem.from_state_space(A, B, C)
    powers = [torch.linalg.matrix_power(torch.tensor(A, dtype=torch.float64), t)[0, 1] for t in range(30)]
    error = system.impulse_response(30).real.flatten() - torch.stack(powers)
    assert float(error.abs().max()) < 1e-14 / gap
    with pytest.raises(NumericalError, match="not diagonalisable"):
        DiagonalSystem.from_state_space([[0.8, 1.0], [0.0, 0.8 + 1e-9]], B, C)
