"""Local distillation of gated delta rule layers: what it gains, that its error is the layer's own, what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import compressm
from compressm.layers import GatedDeltaNet
from compressm.layers.gated_delta_mixer import contraction

STEPS = 30
KINDS = {
    "strict": {"form": "strict"}, "biased": {"form": "strict", "conv_bias": True, "use_gate": False},
    "given maps": {"form": "projected"}, "maps": {"d_state": 6, "allow_neg_eigval": True},
}  # fmt: skip
MIXERS = {
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextGatedDeltaNet"), "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5GatedDeltaNet"),
    "olmo_hybrid": ("OlmoHybridConfig", "OlmoHybridGatedDeltaNet"),
}  # fmt: skip
KIMI = {
    "kimi_linear": ("KimiLinearConfig", "KimiLinearDeltaAttention"),
    "glm5_next": ("Glm5NextTextConfig", "Glm5NextTextLinearAttention"),
    "bailing_hybrid": ("BailingHybridConfig", "BailingHybridDeltaAttention"),
}


def hidden(count=160, seed=1):
    steps = torch.randint(12, (count, 17), generator=torch.Generator().manual_seed(seed)).cumsum(1) % 12
    return torch.randn(12, 8, generator=torch.Generator().manual_seed(0))[steps]


def lively(kind):
    torch.manual_seed(0)
    options = {name: value for name, value in KINDS[kind].items() if name != "form"}
    return GatedDeltaNet(8, head_dim=6, num_heads=2, num_v_heads=4, **options)


def reduced(layer, x, kind="strict", refine=STEPS, **options):
    options |= {"calibration": [x], "form": KINDS[kind].get("form", "auto"), "refine": refine, "sequences": 160}
    return compressm.compress(layer, compressm.FixedRank(3), **options).layers[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_the_layer_s_own_and_falls(kind):
    layer, plain, x = lively(kind), lively(kind), hidden()
    names = set(layer.state_dict())
    with torch.no_grad():
        before, held_out = layer(x), hidden(seed=9)
        full = layer(held_out)
        reduced(plain, x, kind, 0)
        report = reduced(layer, x, kind)
        own = float((layer(x) - before)[-20:].norm() / before[-20:].norm())  # the sequences that were not trained on
        assert own == pytest.approx(report.refine_error_after, rel=1e-4)
        assert (layer(held_out) - full).norm() < 0.995 * (plain(held_out) - full).norm()
        assert report.refine_error_after < report.refine_error_before
        if layer.k_map is not None:
            assert torch.linalg.matrix_norm(contraction(layer.k_map), 2).max() < 1 + 1e-6
    trained = {"k_map", "q_map"} if layer.k_map is not None else {"q_proj", "k_proj", "q_conv1d", "k_conv1d"}
    for name in names:
        if name.partition(".")[0] not in trained:
            assert torch.equal(layer.state_dict()[name], plain.state_dict()[name]), name


@pytest.mark.parametrize("name", MIXERS)
def test_mixers_of_transformers(name):
    """Rows that are interleaved, blocked or apart."""
    transformers = pytest.importorskip("transformers")
    config, kind = MIXERS[name]
    sizes = {"linear_key_head_dim": 6, "linear_value_head_dim": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    torch.manual_seed(0)
    module = getattr(transformers.models, name)
    layer = getattr(getattr(module, f"modeling_{name}"), kind)(getattr(transformers, config)(hidden_size=8, **sizes), 0)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
        x = hidden()
        before, mask = layer(x), torch.ones(160, 17)
        mask[:, :2] = 0
        masked = copy.deepcopy(layer)
        options = {"refine": STEPS, "multiple_of": 1, "sequences": 160}
        report = compressm.compress(layer, compressm.FixedRank(3), calibration=[x], **options).layers[0]
        own = float((layer(x) - before)[-20:].norm() / before[-20:].norm())
        assert own == pytest.approx(report.refine_error_after, rel=1e-3)
        assert report.refine_error_after < report.refine_error_before
        old = masked(x, attention_mask=mask)
        report = compressm.compress(
            masked, compressm.FixedRank(3), calibration=[x], forward=lambda net, batch: net(batch, attention_mask=mask),
            **options,
        ).layers[0]  # fmt: skip
        lost = (masked(x, attention_mask=mask) - old)[-20:, 2:]
        assert float(lost.norm() / old[-20:, 2:].norm()) == pytest.approx(report.refine_error_after, rel=1e-3)


@pytest.mark.parametrize("name", KIMI)
@torch.no_grad()
def test_kimi_delta_attention(name):
    """Maps learn; rows of the states decay by what the map of keys then is."""
    transformers = pytest.importorskip("transformers")
    from compressm.integrations.transformers import accelerate_

    config = getattr(transformers, KIMI[name][0])()
    config.hidden_size, config.linear_head_dim, config.linear_num_heads = 8, 6, 2
    torch.manual_seed(0)
    layer = getattr(getattr(transformers.models, name), f"modeling_{name}").__dict__[KIMI[name][1]](config, 0)
    for parameter in layer.parameters():
        parameter.normal_(std=0.5)
    layer, x, mask = accelerate_(nn.Sequential(layer)), hidden(), torch.ones(160, 17)
    mask[:, :2] = 0
    plain, before, old = copy.deepcopy(layer), layer(x), layer[0](x, attention_mask=mask)
    masked = copy.deepcopy(layer)[0]
    reduced(plain, x, "maps", 0)
    report = reduced(layer, x, "maps")
    own = float((layer(x) - before)[-20:].norm() / before[-20:].norm())
    assert own == pytest.approx(report.refine_error_after, rel=1e-4)
    assert report.refine_error_after < report.refine_error_before
    assert torch.linalg.matrix_norm(contraction(layer[0].k_map), 2).max() < 1 + 1e-6
    for part, value in layer.state_dict().items():
        assert torch.equal(value, plain.state_dict()[part]) != part.endswith(("k_map", "q_map")), part
    report = reduced(masked, x, "maps", forward=lambda net, batch: net(batch, attention_mask=mask))
    lost = (masked(x, attention_mask=mask) - old)[-20:, 2:]
    assert float(lost.norm() / old[-20:, 2:].norm()) == pytest.approx(report.refine_error_after, rel=1e-3)


def test_what_is_more_than_its_parameters_is_not_trained():
    layer, x = lively("strict"), hidden()
    layer.k_conv1d.register_forward_hook(lambda module, args, out: out * 2)
    assert reduced(layer, x).refine_error_before is None
    mapped = lively("maps")
    mapped.q_proj.register_forward_hook(lambda module, args, out: out * 2)
    with torch.no_grad():
        before = mapped(x)
        report = reduced(mapped, x, "maps")
        own = float((mapped(x) - before)[-20:].norm() / before[-20:].norm())
    assert own == pytest.approx(report.refine_error_after, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["biased", "given maps"])
def test_other_precisions(kind, dtype):
    layer = lively(kind).to(dtype)
    report = reduced(layer, hidden().to(dtype), kind)
    assert report.refine_error_after < report.refine_error_before
    assert layer(hidden(2).to(dtype)).dtype == dtype
