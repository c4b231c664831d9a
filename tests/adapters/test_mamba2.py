"""Mamba-2 layers as systems: moments against brute force, edits of both forms, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from adapters.mamba2_layers import data, lively
from torch import nn

import compressm
from compressm.adapters import Mamba2Adapter
from compressm.compression.planning.calibration import collect
from compressm.errors import ArgumentError, DataError, ModelError, NumericalError
from compressm.layers import Mamba2

ADAPTER = Mamba2Adapter()


def scan_by_hand(layer, hidden):
    """S (batch, L, H, N, P), B and C (batch, L, G, N) of a layer of ours, one step at a time."""
    G, H, P, d = layer.ngroups, layer.nheads, layer.headdim, layer.d_ssm
    F = layer.d_features or layer.d_state
    xBC, dt = layer.in_proj(hidden)[..., d:].split([d + 2 * G * F, H], -1)
    xBC = nn.functional.silu(layer.conv1d(xBC.mT)[..., : hidden.shape[1]]).mT
    x, B, C = xBC.split([d, G * F, G * F], -1)
    x, B, C = x.unflatten(-1, (H, P)), B.unflatten(-1, (G, F)), C.unflatten(-1, (G, F))
    if layer.d_features:
        B, C = (torch.einsum("blgn,grn->blgr", part, maps) for part, maps in ((B, layer.B_map), (C, layer.C_map)))
    dt = nn.functional.softplus(dt + layer.dt_bias)
    S, states = torch.zeros(len(hidden), H, layer.d_state, P, dtype=hidden.dtype), []
    for t in range(hidden.shape[1]):
        key = B[:, t].repeat_interleave(H // G, 1)
        S = (
            torch.exp(dt[:, t] * -layer.A_log.exp())[..., None, None] * S
            + key[..., None] * (dt[:, t, :, None] * x[:, t])[:, :, None]
        )
        states.append(S)
    return torch.stack(states, 1), B, C


def measure(layer, batches, **options):
    return collect(layer, {"": (layer, ADAPTER)}, batches, **options)[""]


@pytest.mark.parametrize("options", [{}, {"d_features": 7}])
def test_moments_are_those_of_the_scan(options):
    layer, hidden = lively(**options).requires_grad_(False), data(3, 11)
    moments = measure(layer, [hidden[:2], hidden[2:]], rows_per_state=None)
    S, B, C = scan_by_hand(layer, hidden)
    S = S.unflatten(2, (2, -1))  # heads by groups
    z = C[:, :, :, None, :, None] * S
    torch.testing.assert_close(moments.P, torch.einsum("blgn,blgm->gnm", B, B) / 33)
    torch.testing.assert_close(moments.Q, torch.einsum("blgn,blgm->gnm", C, C) / 33)
    torch.testing.assert_close(moments.Z, torch.einsum("blghnp,blghmp->gnm", z, z) / 33)
    M = torch.einsum("blghnp,blghmp->blgnm", S, S).flatten(0, 1)
    order = [b * 11 + t for rows in ((0, 1), (2,)) for t in range(11) for b in rows]
    torch.testing.assert_close(moments.M.double(), M[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.q.double(), C.flatten(0, 1)[order], rtol=1e-5, atol=1e-5)


def test_steps_are_sampled_evenly():
    layer, hidden = lively().requires_grad_(False), data(8, 40)
    every, some = (measure(layer, [hidden], rows_per_state=rows) for rows in (None, 10))
    assert len(every.M) == 320
    assert 56 <= len(some.M) <= 80
    assert torch.equal(some.P, every.P)
    assert (some.Z - every.Z).norm() < 0.4 * every.Z.norm()


def test_limits_of_the_step_sizes_are_kept():
    layer, hidden = lively(dt_limit=(0.1, 0.2)).requires_grad_(False), data(2, 9)
    wide = copy.deepcopy(layer)
    wide.dt_limit = (0.0, float("inf"))
    assert measure(layer, [hidden]).Z.norm() < 0.2 * measure(wide, [hidden]).Z.norm()


def test_packed_calibration_is_refused():
    layer, hidden = lively(), data(2, 9)
    numbers = torch.zeros(2, 9, dtype=torch.int64)
    with pytest.raises(DataError, match="seq_idx"):
        collect(layer, {"": (layer, ADAPTER)}, [hidden], forward=lambda model, batch: model(batch, seq_idx=numbers))


@pytest.mark.parametrize("rank", [1, 4])
def test_the_strict_form_is_a_layer_of_the_kept_channels(rank):
    layer, hidden = lively().requires_grad_(False), data(4, 30)
    moments = measure(layer, [hidden], rows_per_state=None)
    rows = ADAPTER.analyse(layer, "", "real", moments).reduce(rank).rows
    S, _, C = scan_by_hand(layer, hidden)
    y, full = torch.zeros(4, 30, 4, 4).double(), torch.einsum("blhnp,blhn->blhp", S, C.repeat_interleave(2, 2))
    for head in range(4):
        kept = rows[head // 2]
        y[:, :, head] = torch.einsum("blnp,bln->blp", S[:, :, head, kept], C[:, :, head // 2, kept])
    expected = layer.out_proj(layer.norm(y.flatten(2), layer.in_proj(hidden)[..., : layer.d_ssm]))
    report = compressm.compress(layer, compressm.FixedRank(rank), calibration=[hidden], form="strict", refine=0)
    assert layer.d_state == rank
    assert layer.conv1d.out_channels == layer.conv1d.weight.shape[0] == 16 + 4 * rank
    assert layer.in_proj.out_features == layer.in_proj.weight.shape[0] == 36 + 4 * rank
    torch.testing.assert_close(layer(hidden), expected)
    assert report.layers[0].method.startswith("strict")
    assert report.layers[0].output_error == pytest.approx(float((y - full).norm() / full.norm()), rel=1e-4)


@pytest.mark.parametrize("options", [{"d_features": 6}, {"d_features": 9}])
def test_the_projected_form_has_smaller_maps(options):
    layer, hidden = lively(**options).requires_grad_(False), data(4, 30)
    S, _, C = scan_by_hand(layer, hidden)
    moments = measure(layer, [hidden], rows_per_state=None)
    reduction = ADAPTER.analyse(layer, "", "real", moments).reduce(3)
    weights = {name: value.clone() for name, value in layer.named_parameters() if not name.endswith("_map")}
    report = compressm.compress(layer, compressm.FixedRank(3), calibration=[hidden], refine=0)
    assert (layer.d_state, layer.d_features) == (3, options["d_features"])
    assert layer.B_map.shape == (2, 3, options["d_features"])
    for name, value in weights.items():
        assert torch.equal(layer.get_parameter(name), value)
    assert report.layers[0].method.startswith("projected")
    query, key = (part.repeat_interleave(2, 0) for part in (reduction.query, reduction.key))
    y = torch.einsum("hrn,blhn,hrm,blhmp->blhp", query, C.repeat_interleave(2, 2), key, S)
    expected = layer.out_proj(layer.norm(y.flatten(2), layer.in_proj(hidden)[..., : layer.d_ssm]))
    torch.testing.assert_close(layer(hidden), expected)


def test_projected_loses_less_than_strict():
    hidden, errors = data(8, 40), []
    for form in ("strict", "projected", "auto"):
        report = compressm.compress(lively().requires_grad_(False), compressm.FixedRank(3), calibration=[hidden], form=form)
        errors.append(report.layers[0].output_error)
    mapped = Mamba2(8, d_state=6, headdim=4, ngroups=2, d_features=6).double()
    mapped.load_state_dict(lively().state_dict())
    report = compressm.compress(mapped, compressm.FixedRank(3), calibration=[hidden])
    assert errors[0] > errors[1] == errors[2] == report.layers[0].output_error


@pytest.mark.parametrize("options", [{"d_features": 6}, {}])
def test_all_states_change_no_output(options):
    layer, hidden = lively(**options).requires_grad_(False), data(3, 12)
    before = layer(hidden)
    edit = ADAPTER.edit(layer, ADAPTER.analyse(layer, "", "real", measure(layer, [hidden])).reduce(6))
    with torch.no_grad():
        for name, value in edit.tensors.items():
            layer.get_parameter(name).copy_(value)
    torch.testing.assert_close(layer(hidden), before)


@pytest.mark.parametrize("options", [{"d_features": 6}, {}, {"bias": True}])
def test_cutting_dead_channels_changes_no_output(options):
    layer, hidden = lively(**options).requires_grad_(False), data(3, 12)
    with torch.no_grad():  # channels 1 and 4 of C in the first group, 0 and 5 of B in the second
        first = layer.d_ssm  # of the convolution's channels
        dead = [first + 12 + 1, first + 12 + 4, first + 6 + 0, first + 6 + 5]
        layer.conv1d.weight[dead] = 0
        layer.conv1d.bias[dead] = 0
    before = layer(hidden)
    report = compressm.compress(layer, compressm.FixedRank(4), calibration=[hidden], refine=0)
    assert layer.d_state == 4
    torch.testing.assert_close(layer(hidden), before, rtol=1e-6, atol=1e-6)
    assert report.layers[0].output_error < 1e-5
    assert max(report.layers[0].spectrum[4:]) < 1e-5 * report.layers[0].spectrum[0]


@pytest.mark.parametrize("options", [{"d_features": 6}, {}, {"bias": True, "conv_bias": False}])
def test_moments_are_the_reduced_layer_s_own_gradients(options):
    """Where the cut changes no output, a first moment becomes the gradient that the reduced layer has."""
    layer, hidden = lively(**options), data(3, 12)
    with torch.no_grad():
        taps = layer.conv1d.weight
        taps[layer.d_ssm + 12 :].view(2, 6, -1)[:, 4:] = 0  # the last channels of C in both groups
        if layer.conv1d.bias is not None:
            layer.conv1d.bias[layer.d_ssm + 12 :].view(2, 6)[:, 4:] = 0
    reduction = ADAPTER.analyse(layer, "", "real", measure(layer, [hidden])).reduce(4)
    edit = ADAPTER.edit(layer, reduction)
    names = ADAPTER.parameters(layer)
    loss = (layer(hidden) * torch.linspace(-1, 2, 8).double()).square().sum()
    grads = dict(zip(names, torch.autograd.grad(loss, [layer.get_parameter(name) for name in names]), strict=True))
    carried = edit.first_moments(grads)
    compressm.compress(layer, compressm.FixedRank(4), calibration=[hidden], form="auto" if layer.d_features else "strict")
    loss = (layer(hidden) * torch.linspace(-1, 2, 8).double()).square().sum()
    loss.backward()
    for name in names:
        expected = layer.get_parameter(name).grad
        error = (carried[name] - expected).norm() / expected.norm()
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("options", [{}, {"d_features": 6}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [6, 2])
def test_state_bytes_are_those_of_the_cache(dtype, rank, options):
    layer = lively(dtype=dtype, d_conv=3, **options)
    said = ADAPTER.state_bytes(layer, rank)
    compressm.compress(layer, compressm.FixedRank(rank), form="auto" if layer.d_features else "strict")
    assert layer.d_state == rank
    assert said == ADAPTER.state_bytes(layer, rank) == sum(part.nbytes for part in layer.allocate_inference_cache(1))


def test_data_free_and_inspect():
    layer = lively()
    inspection = compressm.inspect(layer)
    assert [(s.convention, s.gramians) for s in inspection.layers[0].spectra] == [("selective", "data-free")]
    assert 0 < inspection.layers[0].slowest < 1
    report = compressm.compress(layer, compressm.FixedRank(2))
    assert report.layers[0].gramians == "data-free"
    assert layer(data(1, 5)).isfinite().all()


def test_the_paper_s_recipe_is_refused():
    with pytest.raises(ArgumentError, match="got 'paper' for layer ''"):
        compressm.compress(lively(), compressm.FixedRank(2), recipe="paper", calibration=[data(2, 5)])


class WithNorms(Mamba2):
    """Norms over B and C."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.B_norm = nn.RMSNorm(self.d_state)


def test_wrong_layers_are_refused():
    layer = lively()
    with torch.no_grad():
        layer.A_log[0] = torch.nan
    with pytest.raises(NumericalError, match="A_log holds 1 NaN"):
        compressm.compress(layer, compressm.FixedRank(2))
    layer = lively()
    layer.ngroups = 3
    with pytest.raises(ModelError, match="conv1d for 4 heads of 4 in 3 groups"):
        compressm.compress(layer, compressm.FixedRank(2))
    layer = lively()
    nn.utils.parametrize.register_parametrization(layer.in_proj, "weight", nn.Identity())
    with pytest.raises(ModelError, match=r"in_proj\.weight is not a plain parameter"):
        compressm.compress(layer, compressm.FixedRank(2), form="strict")
    compressm.compress(layer, compressm.FixedRank(2))  # which maps leave as it is
    assert layer.d_state == 2
    with pytest.raises(ModelError, match=r"B_norm\.weight"):
        compressm.compress(WithNorms(8, d_state=6, headdim=4), compressm.FixedRank(2))


def test_initial_states_that_are_learned_follow():
    layer, hidden = lively(), data(2, 7)
    layer.init_states = nn.Parameter(10 * torch.randn(4, 4, 6).double())
    blind = measure(lively(), [hidden], rows_per_state=None)
    moments = measure(layer, [hidden], rows_per_state=None)
    assert (moments.Z - blind.Z).norm() > 1e-2 * blind.Z.norm()
    reduction, before = ADAPTER.analyse(layer, "", "real", moments).reduce(2), layer.init_states.detach().clone()
    with pytest.raises(ArgumentError, match="initial states are learned"):
        compressm.compress(layer, compressm.FixedRank(2), form="projected")
    compressm.compress(layer, compressm.FixedRank(2), calibration=[hidden])
    for head in range(4):
        assert torch.equal(layer.init_states[head], before[head][:, reduction.rows[head // 2]])
