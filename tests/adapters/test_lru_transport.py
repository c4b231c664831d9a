"""Moments and averaged copies through a change of basis, against exact Jacobians and true gradients."""

from __future__ import annotations

import math

import pytest
import torch
from adapters.lru_formulas import LRUFormulas
from torch import nn
from torch.autograd.functional import jacobian

from compressm.adapters import LRUAdapter
from compressm.adapters.lru import NAMES
from compressm.control import balance
from compressm.errors import NumericalError
from compressm.layers import LRU

ADAPTER = LRUAdapter()
EXACT = ("gamma_log", "B_re", "B_im", "C_re", "C_im")
CONVENTIONS = pytest.mark.parametrize("convention", ["real", "complex"])


def relative(actual: torch.Tensor, oracle: torch.Tensor) -> float:
    return float(((actual - oracle).norm() / oracle.norm()).detach())


def prepared(convention: str, rank: int, d_state: int = 6, **kwargs):
    layer = LRU(3, d_state, dtype=torch.float64, **kwargs)
    reduction = balance(ADAPTER.read(layer), convention).reduce(rank)
    return layer, reduction, ADAPTER.edit(layer, reduction)


def like_parameters(layer: LRU, positive: bool = False) -> dict[str, torch.Tensor]:
    drawn = {name: torch.randn_like(getattr(layer, name).detach()) for name in NAMES}
    return {name: value**2 for name, value in drawn.items()} if positive else drawn


def embed(reduction, layer: LRU, edit):
    """(B_re, B_im, C_re, C_im) of the full layer as a function of (gamma_log, B_re, B_im, C_re, C_im) of the reduced one."""
    gamma_old = layer.gamma_log.detach().exp()[:, None]
    right, left, mult = reduction.right, reduction.left, reduction.multiplicity
    n = layer.d_state
    # The scale d of every mode is part of the parametrization: B = gamma d B_hat, C = C_hat / d.
    scale = reduction.system.B / (
        edit.tensors["gamma_log"].exp()[:, None] * torch.complex(edit.tensors["B_re"], edit.tensors["B_im"])
    )
    scale = scale[:, :1]

    def full(gamma_log, B_re, B_im, C_re, C_im):
        B = gamma_log.exp()[:, None] * scale * torch.complex(B_re, B_im)
        C = torch.complex(C_re, C_im) / scale.T
        if len(right) == 2 * n:
            states, outputs = (mult * right @ B).real, (C @ left).real
            return states[:n] / gamma_old, states[n:] / gamma_old, outputs[:, :n], -outputs[:, n:]
        states, outputs = right @ B / gamma_old, C @ left
        return states.real, states.imag, outputs.real, outputs.imag

    return full


@CONVENTIONS
@pytest.mark.parametrize(("rank", "phase"), [(1, 6.28), (4, 6.28), (3, 1e-3)])
def test_first_moments_are_the_transposed_jacobian(convention, rank, phase):
    layer, reduction, edit = prepared(convention, rank, max_phase=phase)
    m = like_parameters(layer)
    point = tuple(edit.tensors[name] for name in EXACT)
    jacobians = jacobian(embed(reduction, layer, edit), point)
    carried = edit.first_moments(m)
    for column, name in enumerate(EXACT):
        oracle = sum(
            torch.tensordot(m[full], jacobians[row][column], m[full].dim())
            for row, full in enumerate(("B_re", "B_im", "C_re", "C_im"))
        )
        if convention == "real" and name in ("B_im", "C_im"):  # real modes have no imaginary part to move
            keep = reduction.multiplicity == 2
            oracle = oracle * (keep[:, None] if name == "B_im" else keep)
        assert float((carried[name] - oracle).norm()) <= 1e-9 * float(oracle.norm()) + 1e-12, name


def loss_gradients(layer: LRU, x: torch.Tensor, w: torch.Tensor) -> dict[str, torch.Tensor]:
    names = dict(layer.named_parameters())
    grads = torch.autograd.grad((torch.tanh(layer(x)) * w).sum(), list(names.values()))
    return dict(zip(names, grads, strict=True))


def edited(layer: LRU, edit) -> LRU:
    small = LRU(layer.d_model, edit.rank_after, dtype=torch.float64)
    small.load_state_dict({**edit.tensors, "D": layer.D.detach()})
    return small


@CONVENTIONS
@pytest.mark.parametrize("kind", ["identity", "silent", "unheard"])
def test_transported_gradients_are_true_where_the_cut_is_exact(convention, kind):
    """Full rank, or states that are never excited or never heard: the reduced layer is the same function."""
    layer = LRU(3, 6, dtype=torch.float64)
    with torch.no_grad():
        for weight in {"identity": (), "silent": (layer.B_re, layer.B_im), "unheard": (layer.C_re.T, layer.C_im.T)}[kind]:
            weight[4:] = 0
    rank = 6 if kind == "identity" else 4
    reduction = balance(ADAPTER.read(layer), convention).reduce(rank)
    edit = ADAPTER.edit(layer, reduction)
    small = edited(layer, edit)
    x, w = torch.randn(2, 2, 33, 3, dtype=torch.float64)
    assert relative(small(x), layer(x)) < 1e-9
    carried, oracle = edit.first_moments(loss_gradients(layer, x, w)), loss_gradients(small, x, w)
    for name in NAMES:
        assert relative(carried[name], oracle[name]) < 1e-6, name


def test_duplicated_modes_merge_with_their_gradients():
    layer = LRU(3, 6, dtype=torch.float64)
    with torch.no_grad():
        for name in ("nu_log", "theta_log", "gamma_log", "B_re", "B_im"):
            layer.get_parameter(name)[3:] = layer.get_parameter(name)[:3]
    edit = ADAPTER.edit(layer, balance(ADAPTER.read(layer)).reduce(3))
    small = edited(layer, edit)
    x, w = torch.randn(2, 2, 33, 3, dtype=torch.float64)
    assert relative(small(x), layer(x)) < 1e-9
    carried, oracle = edit.first_moments(loss_gradients(layer, x, w)), loss_gradients(small, x, w)
    for name in EXACT:
        assert relative(carried[name], oracle[name]) < 1e-6, name


@CONVENTIONS
@pytest.mark.parametrize(("rank", "phase"), [(1, 6.28), (4, 6.28), (6, 6.28), (3, 1e-3)])
def test_second_moments(convention, rank, phase):
    layer, _, edit = prepared(convention, rank, max_phase=phase)
    carried = edit.second_moments(like_parameters(layer, positive=True))
    for name in NAMES:
        assert carried[name].shape == edit.tensors[name].shape
        assert torch.isfinite(carried[name]).all()
        assert (carried[name] > 0).all(), name


@CONVENTIONS
def test_second_moments_are_expected_squares_of_carried_gradients(convention):
    """Independent entries of variance v: E[(J^T g)^2] = (J^T)^2 v, by enumerating unit gradients of B and C."""
    layer, _, edit = prepared(convention, 3, d_state=5)
    v = like_parameters(layer, positive=True)
    oracle = {name: torch.zeros_like(edit.tensors[name]) for name in ("B_re", "B_im", "C_re", "C_im")}
    for name in oracle:
        for index in range(v[name].numel()):
            unit = {key: torch.zeros_like(value) for key, value in v.items()}
            unit[name].view(-1)[index] = 1
            moved = edit.first_moments(unit)
            for key in oracle:
                oracle[key] += v[name].reshape(-1)[index] * moved[key] ** 2
    carried = edit.second_moments(v)
    for name, expected in oracle.items():
        moving = expected > 1e-12 * expected.max()  # real modes have no imaginary gradient
        assert relative(carried[name][moving], expected[moving]) < 1e-9, name


@CONVENTIONS
@pytest.mark.parametrize("rank", [2, 5, 6])
def test_averages_equal_to_the_layer_become_the_edited_layer(convention, rank):
    layer, _, edit = prepared(convention, rank)
    carried = edit.values({name: layer.get_parameter(name).detach() for name in NAMES})
    for name in NAMES:
        assert relative(carried[name], edit.tensors[name]) < 1e-8, name


@CONVENTIONS
def test_averages_near_the_layer_keep_their_function(convention):
    layer, reduction, edit = prepared(convention, 6)
    other = LRU(3, 6, dtype=torch.float64)
    other.load_state_dict({k: p + 1e-2 * torch.randn_like(p) for k, p in layer.state_dict().items()})
    carried = edited(other, type(edit)(6, 6, edit.values(dict(other.named_parameters())), *[None] * 3))
    x = torch.randn(2, 33, 3, dtype=torch.float64)
    assert relative(carried(x), other(x)) < 1e-9
    assert reduction.method == "identity"


def test_averages_that_are_not_finite_are_refused():
    layer, _, edit = prepared("real", 3)
    other = {name: layer.get_parameter(name).detach().clone() for name in NAMES}
    other["C_re"][0, 0] = math.nan
    with pytest.raises(NumericalError, match="averaged copy holds NaN or infinite C_re"):
        edit.values(other)


def test_filling_modes_carry_no_projection():
    """Rank asked beyond the numerical rank: filling modes have C = 0, finite moments, and averages keep their eigenvalue."""
    layer = LRU(2, 6, dtype=torch.float64)
    with torch.no_grad():
        for weight in (layer.B_re, layer.B_im):
            weight[2:] = 0
    reduction = balance(ADAPTER.read(layer)).reduce(4)
    edit = ADAPTER.edit(layer, reduction)
    silent = reduction.right.abs().sum(0) == 0
    assert 0 < int(silent.sum()) < 4
    assert not edit.tensors["C_re"][:, silent].any()
    assert all(torch.isfinite(t).all() for t in edit.first_moments(like_parameters(layer)).values())
    carried = edit.values({name: layer.get_parameter(name).detach() for name in NAMES})
    assert relative(carried["nu_log"][silent], edit.tensors["nu_log"][silent]) < 1e-12
    assert isinstance(layer.nu_log, nn.Parameter)


@CONVENTIONS
@pytest.mark.parametrize(("rank", "phase"), [(1, 6.28), (4, 6.28), (6, 6.28), (3, 1e-3)])
def test_derivatives_are_those_written_by_hand(convention, rank, phase):
    layer, reduction, edit = prepared(convention, rank, max_phase=phase)
    old = {name: layer.get_parameter(name).detach() for name in NAMES}
    gamma, B_hat = edit.tensors["gamma_log"].exp()[:, None], torch.complex(edit.tensors["B_re"], edit.tensors["B_im"])
    scale = (reduction.system.B / (gamma * B_hat)).real[:, 0]
    oracle = LRUFormulas(old, edit.tensors, reduction, scale)
    m, v = like_parameters(layer), like_parameters(layer, positive=True)
    other = {name: value + 1e-2 * torch.randn_like(value) for name, value in old.items()}
    for kind, given in (("first_moments", m), ("second_moments", v), ("values", other)):
        carried, expected = getattr(edit, kind)(given), getattr(oracle, kind)(given)
        for name in NAMES:
            assert float((carried[name] - expected[name]).norm()) <= 1e-12 * float(expected[name].norm()), (kind, name)
