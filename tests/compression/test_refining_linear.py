"""Local distillation of linear attention: what it gains, that its error is the layer's own, what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from adapters import linear_layers
from torch import nn

import compressm
from compressm.compression.planning.report import describe
from compressm.errors import ArgumentError
from compressm.layers import LinearAttention

STEPS, HEADS, COUNT = 30, 2, 160
KINDS = {decay: {"decay": decay} for decay in ("none", "fixed", "scalar", "channel")}
KINDS |= {
    "bare": {"decay": "scalar", "output_norm": False, "output_gate": False},
    "scaled": {"decay": "channel", "output_gate": False, "scale": 0.7},
    "convolved": {"decay": "scalar", "d_conv": 3},
    "decays behind taps": {"decay": "channel", "d_conv": 3, "conv_bias": True},
}
TRAINED = ("q_proj", "k_proj", "q_conv1d", "k_conv1d", "gk_proj.1")


def hidden(count=COUNT, seed=1):
    steps = torch.randint(12, (count, 17), generator=torch.Generator().manual_seed(seed)).cumsum(1) % 12
    return torch.randn(12, 8, generator=torch.Generator().manual_seed(0))[steps]


def lively(kind="channel"):
    torch.manual_seed(1)
    layer = LinearAttention(8, HEADS, 1.5, gate_low_rank_dim=3, gate_logit_normalizer=2, **KINDS[kind])
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "q_conv1d", "k_conv1d"):
            if name in layer._modules:
                layer.get_submodule(name).weight.normal_()
    return layer


def reduced(layer, x, refine=STEPS, rank=3, **options):
    options = {"calibration": [x], "sequences": len(x), "multiple_of": 1, "refine": refine, **options}
    return compressm.compress(layer, compressm.FixedRank(rank), **options).layers[0]


def same(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == again and torch.equal(value, twin) for (name, value), (again, twin) in pairs)


def lost(after, before, steps=slice(None)):
    """Relative error on the sequences that were not trained on."""
    watched = slice(-(len(before) // 8), None), steps
    return float((after[watched] - before[watched]).norm() / before[watched].norm())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_error_is_the_layer_s_own_and_falls(kind):
    layer, plain, x, held_out = lively(kind), lively(kind), hidden(), hidden(seed=9)
    before, full = layer(x), layer(held_out)
    reduced(plain, x, 0)
    report = reduced(layer, x)
    assert lost(plain(x), before) == pytest.approx(report.refine_error_before, rel=1e-4)
    assert lost(layer(x), before) == pytest.approx(report.refine_error_after, rel=1e-4)
    assert report.refine_error_after < report.refine_error_before
    gain = 0.98 if "d_conv" in KINDS[kind] else 0.95
    assert (layer(held_out) - full).norm() < gain * (plain(held_out) - full).norm()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]) != name.startswith(TRAINED), name


@pytest.mark.parametrize("behind", ["nothing", "norm", "gate", "gated norm"])
@pytest.mark.parametrize("name", linear_layers.FLA)
@torch.no_grad()
def test_layers_of_flash_linear_attention(name, behind):
    """Their error is their own, with heads that share keys, and with padding."""
    torch.manual_seed(0)
    shared = {} if name == "GatedLinearAttention" else {"num_kv_heads": 2}
    layer, x, mask = getattr(linear_layers, name)(behind=behind, **shared), hidden(), torch.ones(COUNT, 17)
    mask[:, :2] = 0
    masked, before, old = copy.deepcopy(layer), layer(x), layer(x, attention_mask=mask)
    report = reduced(layer, x, rank=2)
    assert lost(layer(x), before) == pytest.approx(report.refine_error_after, rel=1e-3)
    assert report.refine_error_after < report.refine_error_before
    report = reduced(masked, x, rank=2, forward=lambda net, batch: net(batch, attention_mask=mask))
    own = lost(masked(x, attention_mask=mask), old, slice(2, None))
    assert own == pytest.approx(report.refine_error_after, rel=1e-3)


@pytest.mark.parametrize("ours", [False, True], ids=["RetNet", "ours"])
@torch.no_grad()
def test_pairs_that_stay_turn_as_before(ours):
    torch.manual_seed(0)
    options = {"expand_k": 2.0}
    if ours:
        layer = LinearAttention(8, HEADS, decay="fixed", rotary=True, output_gate=False, **options)
    else:
        layer = linear_layers.MultiScaleRetention(rotary="fla", num_kv_heads=2, **options)
    x = hidden()
    before = layer(x)
    report = reduced(layer, x, rank=2)
    assert lost(layer(x), before) == pytest.approx(report.refine_error_after, rel=1e-3)
    assert report.refine_error_after < report.refine_error_before


@torch.no_grad()
def test_a_normaliser_counts():
    torch.manual_seed(0)
    layer, x = linear_layers.LinearAttention(do_feature_map_norm=True), hidden().abs()
    for part in (layer.q_proj, layer.k_proj):
        part.weight.abs_()
    before = layer(x)
    report = reduced(layer, x, rank=2)
    assert lost(layer(x), before) == pytest.approx(report.refine_error_after, rel=1e-3)
    assert report.refine_error_after < report.refine_error_before


@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_it_repeats_itself(kind):
    """The same bits in two calls; without it the bits of a Compressor, which does not refine unless it is asked."""
    layers = [lively(kind) for _ in range(4)]
    for layer in layers[:2]:
        reduced(layer, hidden())
    assert same(*layers[:2])
    options = {"policy": compressm.FixedRank(3), "schedule": compressm.At([1]), "calibration": [hidden()]}
    compressm.Compressor(layers[2], None, **options, sequences=COUNT).step()
    reduced(layers[3], hidden(), 0)
    assert same(*layers[2:])
    assert not same(*layers[1:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["bare", "scaled", "decays behind taps"])
def test_other_precisions(kind, dtype):
    layer = lively(kind).to(dtype)
    report = reduced(layer, hidden().to(dtype))
    assert report.refine_error_after < report.refine_error_before
    assert layer(hidden(2).to(dtype)).dtype == dtype


def test_what_is_more_than_its_parameters_is_not_trained():
    for part in ("k_proj", "gk_proj", "gk_proj.1"):
        layer = lively()
        layer.get_submodule(part).register_forward_hook(lambda module, args, out: out * 2)
        assert reduced(layer, hidden(), 5).refine_error_before is None
    layer, x = lively(), hidden()
    for part in ("v_proj", "g_norm", "gk_proj.0", "o_proj"):
        layer.get_submodule(part).register_forward_hook(lambda module, args, out: out * torch.linspace(0, 1, out.shape[-1]))
    with torch.no_grad():
        before = layer(x)
        report = reduced(layer, x)
        assert lost(layer(x), before) == pytest.approx(report.refine_error_after, rel=1e-4)


@pytest.mark.parametrize("kind", ["scalar", "channel", "decays behind taps"])
def test_an_average_and_the_optimizer_move_along(kind):
    """An average by what was learnt; the optimizer's moments are those of the cut alone."""
    nets, averages, moments = [lively(kind) for _ in range(2)], [], []
    for net, refine in zip(nets, (0, STEPS), strict=True):
        averages.append(copy.deepcopy(net))
        with torch.no_grad():
            for parameter in averages[-1].parameters():
                parameter.add_(0.01)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        net(hidden(4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        reduced(net, hidden(), refine, ema=averages[-1], optimizer=optimizer)
        moments.append({name: optimizer.state[parameter] for name, parameter in net.named_parameters()})
    for name, parameter in nets[1].named_parameters():
        moved = parameter - nets[0].get_parameter(name)
        assert bool(moved.any()) == name.startswith(TRAINED), name
        torch.testing.assert_close(averages[1].get_parameter(name) - averages[0].get_parameter(name), moved)
        for slot in ("exp_avg", "exp_avg_sq"):
            assert moments[1][name][slot].shape == parameter.shape
            assert torch.equal(moments[0][name][slot], moments[1][name][slot])


def test_the_guard_takes_it_back():
    guard = compressm.Rollback(lambda net: float(net.d_state < 6), tolerance=0.1, jump=None, recovery=1, failures=1)
    net = lively()
    before, optimizer = copy.deepcopy(net), torch.optim.AdamW(net.parameters())
    compressor = compressm.Compressor(
        net, optimizer, policy=compressm.FixedRank(3), schedule=compressm.At([1]), calibration=[hidden()], guard=guard,
        refine=STEPS,
    )  # fmt: skip
    report = compressor.step()
    assert report.layers[0].refine_error_after < report.layers[0].refine_error_before
    assert compressor.step().outcome == "rolled back"
    assert same(net, before)


@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_a_lossless_cut_stays_as_it_is(kind):
    """Two directions of every head's queries are not used."""
    nets = [lively(kind) for _ in range(2)]
    for net in nets:
        with torch.no_grad():
            rows = net.q_proj.weight.view(HEADS, 6, 8)
            rows[:, [1, 4]] = 0 if kind == "channel" else rows[:, [0, 3]] - rows[:, [2, 5]]
    report, _ = (reduced(net, hidden(), refine, rank=4) for net, refine in zip(nets, (STEPS, 0), strict=True))
    assert report.refine_error_after == report.refine_error_before < 1e-5
    assert "not refined, as its error is" in describe(report)
    assert same(*nets)


def test_states_with_a_normaliser_of_their_own_are_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.xLSTMConfig(hidden_size=64, num_heads=2, num_hidden_layers=1, qk_dim_factor=1.0)
    layer = nn.Sequential(transformers.models.xlstm.modeling_xlstm.xLSTMLayer(config))
    with pytest.raises(ArgumentError, match=r"5 for layers that are not distilled \(xLSTMLayer\)"):
        reduced(layer, torch.randn(2, 9, 64), 5)
