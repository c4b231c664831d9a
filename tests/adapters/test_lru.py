"""The LRU adapter: reading, editing, phases, and layers it must refuse."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import compressm
from compressm.adapters import LRUAdapter
from compressm.compression.planning.calibration import collect
from compressm.control import DiagonalSystem, balance
from compressm.errors import ModelError, NumericalError
from compressm.layers import LRU

GOLDEN = ["lru_N16_H4_L64", "lru_N32_H16_L64", "lru_N64_H8_L64"]
PARAMETERS = ["nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im", "D"]
ADAPTER = LRUAdapter()


def relative(actual: torch.Tensor, oracle: torch.Tensor) -> float:
    return float(((actual - oracle).norm() / oracle.norm()).detach())


def make(d_model: int = 3, d_state: int = 7, dtype=torch.float64, **kwargs) -> LRU:
    return LRU(d_model, d_state, dtype=dtype, **kwargs)


def from_golden(g) -> LRU:
    layer = make(g["D"].shape[0], g["nu_log"].shape[0])
    layer.load_state_dict({name: g[name] for name in PARAMETERS})
    return layer


def apply(layer: LRU, reduction) -> LRU:
    """A copy of the layer with an edit put in by hand."""
    edited = copy.deepcopy(layer)
    for key, tensor in ADAPTER.edit(layer, reduction).tensors.items():
        edited._parameters[key] = nn.Parameter(tensor)
    return edited


def response(layer: LRU, steps: int = 40) -> torch.Tensor:
    """(steps, H_out, H_in) response of the layer to unit impulses, without the skip."""
    impulses = torch.zeros(layer.d_model, steps, layer.d_model, dtype=torch.float64)
    impulses[torch.arange(layer.d_model), 0, torch.arange(layer.d_model)] = 1
    return (layer.double()(impulses) - layer.D * impulses).detach().permute(1, 2, 0)


def test_reads_the_system_behind_the_layer():
    layer = make()
    assert relative(ADAPTER.read(layer).impulse_response(40).real, response(layer)) < 1e-12


@pytest.mark.parametrize("convention", ["real", "complex"])
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_reduced_layer_is_the_reduced_system(convention, rank):
    layer = make()
    reduction = balance(ADAPTER.read(layer), convention).reduce(rank)
    edited = apply(layer, reduction)
    assert edited.d_state == rank
    assert relative(response(edited), reduction.system.impulse_response(40).real) < 1e-11
    again = ADAPTER.read(edited)
    assert relative(again.impulse_response(40).real, reduction.system.impulse_response(40).real) < 1e-11


@pytest.mark.parametrize("convention", ["real", "complex"])
def test_identity_edit_leaves_the_function_unchanged(convention):
    layer = make()
    edited = apply(layer, balance(ADAPTER.read(layer), convention).reduce(7))
    x = torch.randn(2, 33, 3, dtype=torch.float64)
    assert relative(edited(x), layer(x)) < 1e-12
    assert torch.equal(edited.D, layer.D)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_reduction(golden, name):
    g = golden(name)
    layer, rank = from_golden(g), int(g["red_rank"])
    balanced = balance(ADAPTER.read(layer), "complex")
    reduction = balanced.reduce(rank)
    assert reduction.method == "balanced"
    edited = apply(layer, reduction)
    assert relative(edited(g["x"][None])[0], g["red_y"]) < 1e-6
    reference = make(layer.d_model, rank)
    reference.load_state_dict({name: g.get(f"red_{name}", g["D"]) for name in PARAMETERS})
    order = [torch.argsort(system.log_lam.exp().abs()) for system in (ADAPTER.read(edited), ADAPTER.read(reference))]
    lam = [ADAPTER.read(layer).log_lam.exp()[i] for layer, i in zip((edited, reference), order, strict=True)]
    assert relative(*lam) < 1e-4


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_spectrum_is_that_of_the_gramians(golden, name):
    """sigma^2 are the eigenvalues of PQ, here from plain complex sums."""
    g = golden(name)
    lam = torch.exp(torch.complex(-g["nu_log"].exp(), g["theta_log"].exp()))
    B = g["gamma_log"].exp()[:, None] * torch.complex(g["B_re"], g["B_im"])
    C = torch.complex(g["C_re"], g["C_im"])
    P = B @ B.mH / (1 - lam[:, None] * lam.conj())
    Q = C.mH @ C / (1 - lam.conj()[:, None] * lam)
    oracle = torch.linalg.eigvals(P @ Q).real.clamp(min=0).sqrt().sort(descending=True).values
    hsv = ADAPTER.read(from_golden(g)).hankel_singular_values("complex")
    assert float((hsv - oracle).abs().max()) < 1e-6 * float(oracle[0])
    assert relative(hsv[:4], oracle[:4]) < 1e-11


def test_scale_of_new_modes():
    """gamma = sqrt(1 - |lam|^2), and in the real convention rows of B have the median norm that they had."""
    layer = make()
    with torch.no_grad():
        layer.B_re.mul_(5)
    old = torch.complex(layer.B_re, layer.B_im).norm(dim=1).median()
    edit = ADAPTER.edit(layer, balance(ADAPTER.read(layer)).reduce(4))
    assert (edit.rank_before, edit.rank_after) == (7, 4)
    decay = edit.tensors["nu_log"].exp()
    assert relative(edit.tensors["gamma_log"].exp() ** 2, 1 - torch.exp(-2 * decay)) < 1e-9
    norms = torch.complex(edit.tensors["B_re"], edit.tensors["B_im"]).norm(dim=1)
    assert relative(norms, old.expand(4)) < 1e-12


def test_small_and_negative_phases_stay_away_from_the_logarithm_of_zero():
    log_lam = torch.tensor([-0.1, -0.2 + 1e-4j, -0.3 - 1e-4j, -0.4 - 1j, -0.5 + math.pi * 1j, -0.6 + 2e-3j])
    system = DiagonalSystem(log_lam.to(torch.complex128), torch.ones(6, 1), torch.ones(1, 6))
    layer = make(1, 6)
    edited = apply(layer, balance(system, "complex").reduce(6))
    theta = edited.theta_log.exp()
    two_pi = 2 * math.pi
    expected = torch.tensor([two_pi, two_pi + 1e-4, two_pi - 1e-4, two_pi - 1, math.pi, 2e-3], dtype=torch.float64)
    assert relative(theta, expected) < 1e-7
    edited(torch.ones(1, 5, 1, dtype=torch.float64)).sum().backward()
    assert torch.isfinite(edited.theta_log.grad).all()
    assert (edited.theta_log.grad[:3].abs() > 0).all()


def test_reals_of_the_reduced_system_become_finite_parameters():
    """A layer with phases near zero reduces to real modes; nothing becomes infinite and the response is kept."""
    layer = make(2, 6, max_phase=1e-3)
    reduction = balance(ADAPTER.read(layer)).reduce(2)
    assert (reduction.multiplicity == 1).any()
    edited = apply(layer, reduction)
    assert all(torch.isfinite(p).all() for p in edited.parameters())
    assert relative(response(edited), reduction.system.impulse_response(40).real) < 1e-11


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["nu_log", "theta_log", "B_im", "C_re"])
def test_values_that_are_not_finite_are_named(key, value):
    layer = make()
    with torch.no_grad():
        layer.get_parameter(key).view(-1)[2] = value
    with pytest.raises(NumericalError, match=rf"layer 'enc\.lru' \(LRU\): parameter {key} holds 1 NaN or infinite"):
        ADAPTER.read(layer, "enc.lru")


@pytest.mark.parametrize(("key", "value"), [("nu_log", 800.0), ("theta_log", 710.0), ("gamma_log", 800.0)])
def test_exponentials_that_overflow_are_named(key, value):
    layer = make()
    with torch.no_grad():
        layer.get_parameter(key)[1] = value
    with pytest.raises(NumericalError, match=rf"exp\({key}\) holds 1 NaN or infinite"):
        ADAPTER.read(layer)


@pytest.mark.parametrize("value", [-40.0, -800.0])
def test_eigenvalue_on_the_unit_circle_is_named(value):
    layer = make()
    with torch.no_grad():
        layer.nu_log[3] = value
    with pytest.raises(NumericalError, match=r"nu_log\[3\] = -\d+ means \|lambda\| = 1.*1 such states"):
        ADAPTER.read(layer)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("key", ["nu_log", "B_re", "C_im"])
def test_parametrized_parameters_are_refused(key):
    layer = make()
    parametrize.register_parametrization(layer, key, Doubled())
    with pytest.raises(ModelError, match=rf"layer 'a\.b'.*{key} is not a plain parameter"):
        ADAPTER.read(layer, "a.b")


def test_pruned_parameters_are_refused():
    layer = make()
    prune.l1_unstructured(layer, "C_re", 0.5)
    with pytest.raises(ModelError, match="C_re is not a plain parameter"):
        ADAPTER.read(layer)


def test_edit_keeps_dtypes_and_mutates_nothing():
    layer = make(dtype=torch.bfloat16)
    before = {name: p.clone() for name, p in layer.named_parameters()}
    edit = ADAPTER.edit(layer, balance(ADAPTER.read(layer)).reduce(3))
    assert {tensor.dtype for tensor in edit.tensors.values()} == {torch.bfloat16}
    assert all(torch.equal(before[name], p) for name, p in layer.named_parameters())
    blank = ADAPTER.blank(layer, 3)
    assert {key: tensor.shape for key, tensor in blank.items()} == {key: t.shape for key, t in edit.tensors.items()}
    assert not any(tensor.any() for tensor in blank.values())
    assert set(edit.tensors) == set(ADAPTER.parameters(layer)) == set(PARAMETERS) - {"D"}


def test_input_and_output_of_a_call():
    x, state = torch.zeros(1, 2, 3), torch.zeros(1, 7, dtype=torch.complex64)
    assert ADAPTER.layer_input((x,), {}) == (x, None)
    assert ADAPTER.layer_input((x, state), {}) == (x, state)
    assert ADAPTER.layer_input((), {"x": x, "initial_state": state}) == (x, state)
    with pytest.raises(ModelError, match="NoneType as input"):
        ADAPTER.layer_input((), {})
    assert ADAPTER.layer_output((x, state)) is x
    assert ADAPTER.with_output((x, state), state) == (state, state)
    assert ADAPTER.with_output(x, state) is state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [7, 2])
def test_state_bytes_are_those_of_the_state(dtype, rank):
    layer = make(dtype=torch.float32).to(dtype)
    said = ADAPTER.state_bytes(layer, rank)
    compressm.compress(layer, compressm.FixedRank(rank))
    _, state = layer(torch.zeros(1, 4, 3, dtype=dtype), return_last_state=True)
    assert said == ADAPTER.state_bytes(layer, rank) == state.nbytes == layer.initial_state(1).nbytes
    assert said == rank * (16 if dtype == torch.float64 else 8)


@pytest.mark.parametrize("convention", ["real", "complex"])
def test_which_spectra_bound_the_error(convention):
    layer, batches = make(), [torch.randn(2, 9, 3, dtype=torch.float64)]
    measured = collect(layer, {"": (layer, ADAPTER)}, batches)[""]
    for found in (None, measured):
        assert ADAPTER.analyse(layer, "", convention, found).bounded == ADAPTER.bounded(convention, found is not None)
