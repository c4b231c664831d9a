"""Gated delta rule layers as systems: what is measured, both forms, the optimizer's moments, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from adapters.linear_layers import DeltaNet
from adapters.training import train
from torch import nn

import compressm
from compressm.adapters import GatedDeltaNetAdapter, find_layers
from compressm.errors import ArgumentError, ModelError, NumericalError
from compressm.layers import GatedDeltaNet
from compressm.layers.gated_delta_mixer import contraction, read

KINDS = [{}, {"num_v_heads": 4, "conv_bias": True}, {"d_state": 5, "allow_neg_eigval": True}]


def lively(seed=0, **options):
    torch.manual_seed(seed)
    layer = GatedDeltaNet(8, head_dim=6, num_heads=2, **options).double()
    with torch.no_grad():
        for parameter in (layer.q_proj.weight, layer.k_proj.weight):
            parameter.mul_(3)
    layer.o_norm.eps = 1e-12  # so that the norm takes the scale of queries out
    return layer.requires_grad_(False)


def data(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def measure(layer, batches):
    meter = GatedDeltaNetAdapter().meter(layer, "", 4, None, 0)
    for batch in batches:
        meter.observe(layer, (batch,), {}, None)
    return meter.result("")


@pytest.mark.parametrize("options", KINDS)
def test_moments_are_those_of_the_rule(options):
    layer, batches = lively(**options), [data(2, 9, 8), data(3, 5, 8, seed=2)]
    moments = measure(layer, batches)
    q, k, beta = (torch.cat([getattr(read(layer, x), n).flatten(0, 1) for x in batches]) for n in ("q", "k", "beta"))
    P = torch.einsum("thk,thl->hkl", k, k) / len(k)
    Q = torch.einsum("thk,thl->hkl", q, q) / len(k)
    weight = beta.view(len(k), 2, -1).square().mean(-1)
    erased = torch.einsum("th,thk,thl->hkl", weight, k, k) / len(k)
    torch.testing.assert_close(moments.P, P)
    torch.testing.assert_close(moments.Q, Q + erased)
    torch.testing.assert_close(moments.Z, P * Q)


def test_padding_is_not_measured():
    layer, x = lively(), data(2, 9, 8)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    meter = GatedDeltaNetAdapter().meter(layer, "", 4, None, 0)
    meter.observe(layer, (x,), {"attention_mask": mask}, None)
    alone = measure(layer, [x[1:]])
    behind = measure(layer, [x[:1, 4:]])
    torch.testing.assert_close(meter.result("").P, (9 * alone.P + 5 * behind.P) / 14)


@pytest.mark.parametrize("options", KINDS[:2])
def test_the_strict_form_is_a_layer_of_the_kept_channels(options):
    layer, x = lively(**options), data(3, 20, 8)
    kept = GatedDeltaNetAdapter().analyse(layer, "", "real", measure(layer, [x])).reduce(4).rows
    expected = GatedDeltaNet(8, expand_v=12 / 4, head_dim=4, num_heads=2, **options).double()
    index = (torch.arange(2)[:, None] * 6 + kept).flatten()
    state = layer.state_dict()
    for name in ("q_proj.weight", "k_proj.weight", "q_conv1d.weight", "k_conv1d.weight", "q_conv1d.bias", "k_conv1d.bias"):
        if name in state:
            state[name] = state[name][index]
    expected.load_state_dict(state)
    expected.o_norm.eps = 1e-12
    report = compressm.compress(layer, compressm.FixedRank(4), calibration=[x], form="strict", refine=0).layers[0]
    assert report.method == "strict, backward subset"
    assert layer.d_state == layer.head_k_dim == 4
    assert layer.q_proj.out_features == layer.k_conv1d.groups == 8
    torch.testing.assert_close(layer(x), expected(x))
    assert report.state_bytes_after == sum(part.nbytes for part in layer.allocate_inference_cache(1))


@pytest.mark.parametrize("options", KINDS)
def test_the_projected_form_keeps_keys_short(options):
    layer, x = lively(**options), data(3, 20, 8)
    moments = measure(layer, [x])
    reduction = GatedDeltaNetAdapter(form="projected").analyse(layer, "", "real", moments).reduce(3)
    before = None if layer.k_map is None else contraction(layer.k_map)
    report = compressm.compress(layer, compressm.FixedRank(3), calibration=[x], refine=0).layers[0]
    assert report.method == "projected, orthonormal keys"
    torch.testing.assert_close(reduction.key @ reduction.key.mT, torch.eye(3).double().expand(2, 3, 3))
    torch.testing.assert_close(layer.k_map, reduction.key if before is None else reduction.key @ before)
    assert layer.k_map.shape == (2, 3, 6)
    assert torch.linalg.matrix_norm(contraction(layer.k_map), 2).max() < 1 + 1e-12
    gain = reduction.query @ reduction.key.mT  # what is kept is read as it was
    torch.testing.assert_close(gain, torch.eye(3).double().expand(2, 3, 3), rtol=1e-4, atol=1e-4)


def test_projected_loses_less_than_a_subset():
    x, errors = data(8, 40, 8), {}
    for form in ("strict", "projected", "auto"):
        layer = lively()
        before = layer(x)
        compressm.compress(layer, compressm.FixedRank(4), calibration=[x], form=form, refine=0)
        errors[form] = float((layer(x) - before).norm() / before.norm())
    assert errors["projected"] == errors["auto"] < 0.8 * errors["strict"]


@pytest.mark.parametrize("form", ["strict", "projected"])
def test_what_no_token_uses_is_cut_without_a_change(form):
    layer, x = lively(), data(3, 20, 8)
    with torch.no_grad():
        for part in (layer.q_conv1d, layer.k_conv1d):
            part.weight.view(2, 6, -1)[:, [1, 4]] = 0
    before = layer(x)
    compressm.compress(layer, compressm.FixedRank(4), calibration=[x], form=form, refine=0)
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)


def test_moments_are_the_reduced_layer_s_own_gradients():
    """Where the cut changes no output, a first moment of the maps becomes the gradient that the reduced layer has."""
    layer, x = lively(d_state=6), data(3, 20, 8)
    with torch.no_grad():
        for part in (layer.q_conv1d, layer.k_conv1d):
            part.weight.view(2, 6, -1)[:, [1, 4]] = 0
    layer.requires_grad_(True)
    adapter = find_layers(layer)[""][1]
    reduction = adapter.analyse(layer, "", "real", measure(layer, [x])).reduce(4)
    edit = adapter.edit(layer, reduction)
    names = ("k_map", "q_map")

    def gradients():
        loss = (layer(x) * torch.linspace(-1, 2, 8).double()).square().sum()
        return dict(zip(names, torch.autograd.grad(loss, [layer.k_map, layer.q_map]), strict=True))

    carried = edit.first_moments(gradients())
    compressm.compress(layer, compressm.FixedRank(4), calibration=[x], refine=0)
    for name, expected in gradients().items():
        assert (carried[name] - expected).norm() < 1e-3 * expected.norm(), name


@pytest.mark.parametrize("form", ["strict", "projected"])
def test_training_goes_on_and_a_checkpoint_resumes(form, tmp_path):
    def setup():
        torch.manual_seed(0)
        model = nn.Sequential(GatedDeltaNet(8, head_dim=6, num_heads=2), nn.Linear(8, 8))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        calibration, schedule = [data(4, 15, 8).float()], compressm.At([2])
        return model, optimizer, compressm.Compressor(
            model, optimizer, policy=compressm.FixedRank(3), schedule=schedule, calibration=calibration, form=form
        )

    def batch(step):
        return data(4, 15, 8, seed=step).float()

    model, optimizer, compressor = setup()
    train(model, optimizer, compressor, range(3), batch)
    assert model[0].d_state == 3
    compressm.save(tmp_path / "c.safetensors", model, optimizer=optimizer, compressor=compressor)
    straight = train(model, optimizer, compressor, range(3, 6), batch)
    again = setup()
    compressm.load(tmp_path / "c.safetensors", again[0], optimizer=again[1], compressor=again[2])
    assert train(*again, range(3, 6), batch) == straight


def test_what_is_refused():
    layer = lively()
    with pytest.raises(ArgumentError, match="that has maps"):
        compressm.compress(lively(d_state=4), compressm.FixedRank(2), form="strict")
    with pytest.raises(ArgumentError, match="no method"):
        compressm.compress(layer, compressm.FixedRank(2), recipe="paper")
    with torch.no_grad():
        layer.A_log[0] = torch.nan
    with pytest.raises(NumericalError, match="A_log holds 1 NaN"):
        compressm.compress(layer, compressm.FixedRank(2))
    layer = lively()
    layer.num_k_heads = 5
    with pytest.raises(ModelError, match="expected numbers that divide"):
        compressm.compress(layer, compressm.FixedRank(2))
    hooked = lively()
    nn.utils.parametrize.register_parametrization(hooked.q_proj, "weight", nn.Identity())
    with pytest.raises(ModelError, match=r"q_proj\.weight is not a plain parameter"):
        compressm.compress(hooked, compressm.FixedRank(2), form="strict")


def test_flash_linear_attention_s_delta_net():
    """By its name, with short convolutions that are called in another way than torch's."""
    torch.manual_seed(0)
    layer, x = DeltaNet(hidden_size=12, expand_k=2).double().requires_grad_(False), data(40, 17, 12)
    with torch.no_grad():
        for part in (layer.q_conv1d, layer.k_conv1d):
            part.weight.view(4, 6, -1)[:, [1, 4]] = 0
    before, other = layer(x), copy.deepcopy(layer)
    assert compressm.inspect(layer).layers[0].slowest == 1
    (report,) = compressm.compress(layer, compressm.FixedRank(4), calibration=[x], multiple_of=1, refine=0).layers
    assert report.method == "strict, backward subset"
    assert (layer.head_k_dim, layer.key_dim, layer.q_conv1d.hidden_size) == (4, 16, 16)
    assert layer.expand_k == 16 / 12
    torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-4)
    (report,) = compressm.compress(other, compressm.FixedRank(3), calibration=[x], multiple_of=1, refine=5, sequences=40).layers
    own = float((other(x) - before)[-5:].norm() / before[-5:].norm())
    assert min(report.refine_error_before, report.refine_error_after) == pytest.approx(own, rel=1e-3)
    with pytest.raises(ArgumentError, match="whose forward has no maps"):
        compressm.compress(layer, compressm.FixedRank(2), form="projected")
    layer.qk_norm = "sum"
    with pytest.raises(ModelError, match="qk_norm='sum', expected qk_norm='l2'"):
        compressm.compress(layer, compressm.FixedRank(2), multiple_of=1)


def test_data_free_and_inspect():
    layer = lively()
    inspection = compressm.inspect(layer)
    assert [(s.convention, s.gramians) for s in inspection.layers[0].spectra] == [("selective", "data-free")]
    assert 0 < inspection.layers[0].slowest < 1
    assert compressm.compress(copy.deepcopy(layer), compressm.FixedRank(2)).layers[0].gramians == "data-free"
