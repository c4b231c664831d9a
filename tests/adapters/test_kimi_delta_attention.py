"""flash-linear-attention's Kimi Delta Attention: what is read, the strict form, the optimizer's moments, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from adapters.linear_layers import KimiDeltaAttention
from adapters.training import train
from torch import nn

import compressm
from compressm.adapters import find_layers
from compressm.control import DRRQR
from compressm.errors import ArgumentError, ModelError
from compressm.layers.gated_delta_mixer import read, rule

KINDS = [{}, {"num_v_heads": 4, "conv_bias": True, "expand_v": 0.5}, {"lower_bound": -5.0}]
KEYS = ("q_proj.weight", "k_proj.weight", "q_conv1d.weight", "k_conv1d.weight", "q_conv1d.bias", "k_conv1d.bias")
GATES = ("f_proj.1.weight", "dt_bias")
CUT = {"multiple_of": 1, "refine": 0}


def lively(seed=0, **options):
    torch.manual_seed(seed)
    layer = KimiDeltaAttention(**options).double()
    with torch.no_grad():
        for parameter in (layer.q_proj.weight, layer.k_proj.weight, *layer.f_proj.parameters()):
            parameter.mul_(3)
        layer.A_log.uniform_(-1, 1)
    return layer.requires_grad_(False)


def data(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def analysed(layer, x):
    adapter = find_layers(layer)[""][1].in_form(layer, "strict")
    meter = adapter.meter(layer, "", len(x), None, 0)
    meter.observe(layer, (x,), {}, None)
    return adapter, adapter.analyse(layer, "", "real", meter.result(""))


def reduced(layer, rows):
    """By hand: a layer of the library's own constructor with the kept rows (G, r) of every head of keys."""
    sizes = {name: getattr(layer, name) for name in ("hidden_size", "num_heads", "num_v_heads", "lower_bound")}
    other = KimiDeltaAttention(
        head_dim=rows.shape[1], expand_v=layer.head_v_dim / rows.shape[1], conv_bias=layer.q_conv1d.bias is not None, **sizes
    ).double()
    state = layer.state_dict()
    for name in state.keys() & {*KEYS, *GATES}:
        heads = state[name].view(-1, layer.head_k_dim, *state[name].shape[1:])
        kept = rows.repeat_interleave(len(heads) // len(rows), 0)
        state[name] = torch.cat([head[index] for head, index in zip(heads, kept, strict=True)])
    other.load_state_dict(state)
    return other.requires_grad_(False)


@pytest.mark.parametrize("options", KINDS)
def test_it_is_read_as_the_library_s_recurrence(options):
    layer, x = lively(**options), data(2, 11, 8)
    inputs = read(layer, x)
    out, _ = rule(layer, inputs)
    gate = layer.g_proj(x).unflatten(-1, (-1, layer.head_v_dim))
    torch.testing.assert_close(layer.o_proj(layer.o_norm(out, gate).flatten(-2)), layer(x), rtol=1e-10, atol=1e-10)
    assert inputs.g.shape == (2, 11, layer.num_v_heads, 6)
    assert 0 < compressm.inspect(layer).layers[0].slowest < 1


@pytest.mark.parametrize("options", KINDS)
def test_all_channels_change_no_output(options):
    layer, x = lively(**options), data(2, 12, 8)
    before = layer(x)
    adapter, analysis = analysed(layer, x)
    with torch.no_grad():
        for name, value in adapter.edit(layer, analysis.reduce(6)).tensors.items():
            layer.get_parameter(name).copy_(value)
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", KINDS)
def test_the_strict_form_is_a_layer_of_the_kept_channels(options, tmp_path):
    layer, x = lively(**options), data(3, 20, 8)
    whole = copy.deepcopy(layer)
    expected = reduced(layer, analysed(layer, x)[1].reduce(4).rows)
    (report,) = compressm.compress(layer, compressm.FixedRank(4), calibration=[x], **CUT).layers
    assert report.method == "strict, backward subset"
    heads = layer.num_v_heads
    assert (layer.head_dim, layer.head_k_dim, layer.key_dim, layer.gate_dim) == (4, 4, 8, 4 * heads)
    assert layer.f_proj[1].out_features == len(layer.f_proj[1].weight) == 4 * heads
    assert (layer.q_proj.out_features, layer.k_conv1d.groups, layer.q_conv1d.hidden_size) == (8, 8, 8)
    assert layer.f_proj[0].out_features == layer.head_v_dim == int(4 * layer.expand_v)
    torch.testing.assert_close(layer(x), expected(x), rtol=0, atol=1e-12)
    window = 3 * (16 + layer.value_dim)
    assert report.state_bytes_after == 8 * (heads * 4 * layer.head_v_dim + window)
    names = ("hidden_size", "expand_v", "head_dim", "num_heads", "num_v_heads", "lower_bound")
    sizes = {name: getattr(layer, name) for name in names}
    fresh = KimiDeltaAttention(conv_bias=options.get("conv_bias", False), **sizes).double()
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh(x), layer(x), rtol=0, atol=0)
    compressm.load(compressm.save(tmp_path / "c.safetensors", layer), whole)
    torch.testing.assert_close(whole(x), layer(x), rtol=0, atol=0)
    assert (whole.head_dim, whole.expand_v, whole.gate_dim) == (4, layer.expand_v, layer.gate_dim)


@pytest.mark.parametrize("options", KINDS)
def test_moments_are_the_reduced_layer_s_own_gradients(options):
    """Where the cut changes no output, a first moment becomes the gradient that the reduced layer has."""
    layer, x = lively(**options), data(2, 15, 8)
    for part in (layer.q_conv1d, layer.k_conv1d):
        part.weight.view(2, 6, -1)[:, [1, 4]] = 0
        if part.bias is not None:
            part.bias.view(2, 6)[:, [1, 4]] = 0
    layer.requires_grad_(True)
    adapter, analysis = analysed(layer, x)
    edit, names = adapter.edit(layer, analysis.reduce(4)), adapter.parameters(layer)
    assert set(GATES) < set(names)

    def gradients():
        loss = (layer(x) * torch.linspace(-1, 2, 8).double()).square().sum()
        return dict(zip(names, torch.autograd.grad(loss, [layer.get_parameter(name) for name in names]), strict=True))

    old = gradients()
    carried, squared = edit.first_moments(old), edit.second_moments({name: g.square() for name, g in old.items()})
    compressm.compress(layer, compressm.FixedRank(4), calibration=[x], **CUT)
    for name, expected in gradients().items():
        torch.testing.assert_close(carried[name], expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        torch.testing.assert_close(squared[name], carried[name].square())


def test_training_goes_on_and_a_checkpoint_resumes(tmp_path):
    def setup():
        torch.manual_seed(0)
        model = nn.Sequential(KimiDeltaAttention(num_v_heads=4), nn.Linear(8, 8))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        options = {"policy": compressm.FixedRank(3), "schedule": compressm.At([2]), "calibration": [data(4, 9, 8).float()]}
        return model, optimizer, compressm.Compressor(model, optimizer, multiple_of=1, **options)

    def batch(step):
        return data(4, 9, 8, seed=step).float()

    model, optimizer, compressor = setup()
    train(model, optimizer, compressor, range(2), batch)
    moments = {name: optimizer.state[model[0].get_parameter(name)]["exp_avg"] for name in GATES}
    assert [moments[name].shape for name in GATES] == [(12, 6), (12,)]
    assert all(bool((moment != 0).any()) for moment in moments.values())
    compressm.save(tmp_path / "c.safetensors", model, optimizer=optimizer, compressor=compressor)
    straight = train(model, optimizer, compressor, range(2, 5), batch)
    again = setup()
    compressm.load(tmp_path / "c.safetensors", again[0], optimizer=again[1], compressor=again[2])
    assert train(*again, range(2, 5), batch) == straight


def test_it_is_distilled_with_the_decays_of_the_kept_channels():
    layer, x = lively(num_v_heads=4), data(40, 9, 8)
    before, cut = layer(x), copy.deepcopy(layer)
    options = {"calibration": [x], "multiple_of": 1, "sequences": 40}
    (report,) = compressm.compress(layer, compressm.FixedRank(4), refine=100, **options).layers
    compressm.compress(cut, compressm.FixedRank(4), refine=0, **options)
    errors = [float((model(x) - before)[-5:].norm() / before[-5:].norm()) for model in (cut, layer)]
    assert report.refine_error_before == pytest.approx(errors[0], rel=1e-3)
    assert report.refine_error_after == pytest.approx(errors[1], rel=1e-3)
    assert errors[1] < errors[0]


def test_a_criterion_chooses_channels_with_their_decays():
    layer, x = lively(), data(3, 12, 8)
    (report,) = compressm.compress(layer, compressm.FixedRank(4), calibration=[x], criterion=DRRQR(), **CUT).layers
    assert report.method == "strict, DRRQR"
    assert len(layer.dt_bias) == 8


def test_what_is_refused():
    layer, x = lively(), data(3, 12, 8)
    with pytest.raises(ArgumentError, match="whose forward has no maps"):
        compressm.compress(layer, compressm.FixedRank(3), form="projected")
    analysis = analysed(layer, x)[1]
    for rank in (0, 7):
        with pytest.raises(ArgumentError, match="rank"):
            analysis.reduce(rank)
    with pytest.raises(ArgumentError, match=r"a multiple of 2.*3 states for a KimiDeltaAttention"):
        compressm.compress(lively(head_dim=8), compressm.FixedRank(3), calibration=[x])
    layer.num_heads = 5
    with pytest.raises(ModelError, match="expected numbers that divide"):
        compressm.compress(layer, compressm.FixedRank(3))
    layer = lively()
    layer.dt_bias = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ModelError, match=r"2 decays for 2 heads of values and 6 channels"):
        compressm.compress(layer, compressm.FixedRank(3))
    del layer.q_conv1d
    with pytest.raises(ModelError, match=r"no q_conv1d\.weight.*use_short_conv=True"):
        compressm.compress(layer, compressm.FixedRank(3))
