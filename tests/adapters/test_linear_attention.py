"""Linear attention layers as systems: what is measured, what is absorbed, the optimizer's moments, what is refused."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from adapters import linear_layers
from adapters.training import train
from torch import nn

import compressm
from compressm.adapters import find_layers
from compressm.compression.planning.calibration import collect
from compressm.errors import ArgumentError, ModelError, NumericalError
from compressm.layers import LinearAttention

logging.getLogger("transformers").setLevel(logging.ERROR)
HEADS, K = 2, 6
DECAYS = ("none", "fixed", "scalar", "channel")
KINDS = {decay: {"decay": decay} for decay in DECAYS}
KINDS |= {"bare": {"decay": "scalar", "output_norm": False, "output_gate": False}, "convolved": {"d_conv": 3}}
KINDS |= {"rotary": {"decay": "fixed", "rotary": True}, "turned": {"decay": "scalar", "rotary": True, "d_conv": 3}}
METHODS = {"channel": "backward subset, queries predicted", "convolved": "strict, backward subset"}
METHODS |= dict.fromkeys(("rotary", "turned"), "strict, backward subset of pairs")
SUBSETS = ("channel", "convolved", "rotary", "turned")


def lively(kind, seed=0, **options):
    torch.manual_seed(seed)
    layer = LinearAttention(8, HEADS, 1.5, gate_low_rank_dim=3, gate_logit_normalizer=2, **KINDS[kind], **options).double()
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "q_conv1d", "k_conv1d"):
            if name in layer._modules:
                layer.get_submodule(name).weight.normal_()
    if layer.output_norm:
        layer.g_norm.eps = 1e-12  # so that the norm takes the scale of queries out
    return layer


def kill(layer, queries_alone=False):
    """Two directions of every head's queries and keys are not used."""
    with torch.no_grad():
        if layer.d_conv or layer.decay == "channel" or layer.inv_freq is not None:
            parts = [layer.q_conv1d, layer.k_conv1d] if layer.d_conv else [layer.q_proj, layer.k_proj]
            for part in parts[: 1 if queries_alone else 2]:
                part.weight.view(HEADS, K, -1)[:, [1, 4]] = 0
            return
        for part in (layer.q_proj, layer.k_proj)[: 1 if queries_alone else 2]:
            weight = part.weight.view(HEADS, K, -1)
            weight.copy_(torch.randn(HEADS, K, 4).double() @ torch.randn(HEADS, 4, 8).double())


def data(*shape, seed=1):
    return torch.randn(*shape, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def measure(layer, batches, **options):
    return collect(layer, find_layers(layer), batches, **options)[""]


def recurrence(layer, x):
    """Queries, keys (batch, L, H, K) and states (batch, L, H, K, V) of a layer without convolutions, one step at a time."""
    q, k, v = (part(x).unflatten(-1, (HEADS, -1)) for part in (layer.q_proj, layer.k_proj, layer.v_proj))
    g = layer._log_decays(x)
    g = torch.zeros(HEADS).double() if g is None else g.double()
    g = g.expand(*x.shape[:2], HEADS)[..., None] if layer.decay != "channel" else g
    state, states = torch.zeros(len(x), HEADS, K, v.shape[-1]).double(), []
    for t in range(x.shape[1]):
        state = g[:, t, ..., None].exp() * state + k[:, t, ..., None] * v[:, t, :, None]
        states.append(state)
    return q, k, torch.stack(states, 1)


@pytest.mark.parametrize("decay", DECAYS)
def test_moments_are_those_of_the_recurrence(decay):
    layer, x = lively(decay).requires_grad_(False), data(3, 11)
    moments = measure(layer, [x[:2], x[2:]], rows_per_state=None)
    q, k, S = recurrence(layer, x)
    P = torch.einsum("blhkv,blhjv->hkj", S, S) if decay == "channel" else torch.einsum("blhk,blhj->hkj", k, k)
    torch.testing.assert_close(moments.P, P / 33)
    torch.testing.assert_close(moments.Q, torch.einsum("blhk,blhj->hkj", q, q) / 33)


@pytest.mark.parametrize("decay", DECAYS)
def test_what_two_processes_have_measured_adds_up(decay):
    """The same on both: twice the sums over twice the tokens."""
    layer, x = lively(decay).requires_grad_(False), data(3, 11)
    meter = find_layers(layer)[""][1].meter(layer, "", 3, None, 0)
    meter.observe(layer, (x,), {}, None)
    alone = meter.result("")
    meter.merge(lambda value: 2 * value, lambda tensor: torch.cat([tensor, tensor]))
    for name in ("P", "Q", "Z"):
        torch.testing.assert_close(getattr(meter.result(""), name), getattr(alone, name))
    assert len(meter.result("").M) == 2 * len(alone.M)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unused", ["both", "queries"])
def test_what_is_not_used_is_cut_without_a_change(kind, unused):
    layer, x = lively(kind).requires_grad_(False), data(3, 20)
    kill(layer, unused == "queries")
    before, average = layer(x), torch.optim.swa_utils.AveragedModel(layer)
    (report,) = compressm.compress(layer, compressm.FixedRank(4), calibration=[x], ema=average).layers
    assert report.method == METHODS.get(kind, "absorbed, balanced pair")
    assert layer.head_k_dim == 4
    assert layer.q_proj.out_features == len(layer.k_proj.weight) == round(8 * layer.expand_k) == 8
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(average(x), before, rtol=1e-5, atol=1e-5)
    conv_state, state = layer.allocate_inference_cache(3)
    steps = [layer.step(x[:, t : t + 1], conv_state, state)[0] for t in range(20)]
    torch.testing.assert_close(torch.cat(steps, 1), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_all_channels_change_no_output(kind):
    layer, x = lively(kind).requires_grad_(False), data(3, 12)
    before, adapter = layer(x), find_layers(layer)[""][1]
    edit = adapter.edit(layer, adapter.analyse(layer, "", "real", measure(layer, [x])).reduce(K))
    with torch.no_grad():
        for name, value in edit.tensors.items():
            layer.get_parameter(name).copy_(value)
    torch.testing.assert_close(layer(x), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_the_reduced_layer_s_own_gradients(kind):
    """Where the cut changes no output, a first moment becomes the gradient that the reduced layer has."""
    layer, x = lively(kind), data(3, 12)
    kill(layer, queries_alone=kind not in SUBSETS)
    adapter = find_layers(layer)[""][1]
    edit = adapter.edit(layer, adapter.analyse(layer, "", "real", measure(layer, [x])).reduce(4))
    names = adapter.parameters(layer)

    def gradients():
        loss = (layer(x) * torch.linspace(-1, 2, 8).double()).square().sum()
        return dict(zip(names, torch.autograd.grad(loss, [layer.get_parameter(name) for name in names]), strict=True))

    old = gradients()
    carried, squared = edit.first_moments(old), edit.second_moments({name: torch.ones_like(g) for name, g in old.items()})
    compressm.compress(layer, compressm.FixedRank(4), calibration=[x])
    for name, expected in gradients().items():
        error = (carried[name] - expected).norm() / expected.norm()
        assert error < 1e-5, f"{name}: {error:.1e}"
        assert bool((squared[name] > 0).all())


@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_it_loses_less_than_the_best_of_many_subsets(kind):
    layer, x = lively(kind).requires_grad_(False), data(8, 40)
    before, losses = layer(x), []
    for seed in range(6):
        rows = torch.stack(
            [torch.randperm(K, generator=torch.Generator().manual_seed(10 * seed + h))[:3] for h in range(HEADS)]
        )
        cut = copy.deepcopy(layer)
        with torch.no_grad():
            for name in ("q_proj.weight", "k_proj.weight", "gk_proj.1.weight", "gk_proj.1.bias"):
                if kind == "channel" or name[0] in "qk":
                    old = layer.get_parameter(name).view(HEADS, K, -1)
                    new = torch.stack([part[kept] for part, kept in zip(old, rows, strict=True)])
                    owner, leaf = name.rpartition(".")[::2]
                    shape = (HEADS * 3, *layer.get_parameter(name).shape[1:])
                    setattr(cut.get_submodule(owner), leaf, nn.Parameter(new.reshape(shape), False))
        cut.q_proj.out_features = HEADS * 3
        losses.append(float((cut(x) - before).norm()))
    compressm.compress(layer, compressm.FixedRank(3), calibration=[x], refine=0)
    assert float((layer(x) - before).norm()) < 0.8 * min(losses)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [K, 2])
def test_state_bytes_are_those_of_the_cache(kind, rank):
    layer = lively(kind).float()
    adapter = find_layers(layer)[""][1]
    said = adapter.state_bytes(layer, rank)
    compressm.compress(layer, compressm.FixedRank(rank))
    assert said == adapter.state_bytes(layer, rank) == sum(part.nbytes for part in layer.allocate_inference_cache(1))


def untouched(kind):
    torch.manual_seed(0)
    model = nn.Sequential(lively(kind), nn.Linear(8, 8)).float()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def setup(kind, **options):
    model, optimizer = untouched(kind)
    left = 3 if model[0].inv_freq is None else 4  # whole pairs
    options = {"policy": compressm.FixedRank(left), "calibration": [data(4, 15).float()]} | options
    return model, optimizer, compressm.Compressor(model, optimizer, schedule=compressm.At([2]), **options)


def batch(step):
    return data(4, 15, seed=step).float()


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_and_a_checkpoint_resumes(kind, tmp_path):
    model, optimizer, compressor = setup(kind)
    train(model, optimizer, compressor, range(3), batch)
    left = model[0].head_k_dim
    assert left == (3 if model[0].inv_freq is None else 4)
    compressm.save(tmp_path / "c.safetensors", model, optimizer=optimizer, compressor=compressor)
    straight = train(model, optimizer, compressor, range(3, 6), batch)
    again = setup(kind)
    compressm.load(tmp_path / "c.safetensors", again[0], optimizer=again[1], compressor=again[2])
    assert again[0][0].q_proj.out_features == HEADS * left
    assert train(*again, range(3, 6), batch) == straight


@pytest.mark.parametrize("kind", ["scalar", "channel", "rotary"])
def test_the_guard_takes_it_back(kind):
    guard = compressm.Rollback(
        lambda model: float(model[0].head_k_dim < K), tolerance=0.1, jump=None, recovery=2, failures=1
    )  # fmt: skip
    model, optimizer, compressor = setup(kind, guard=guard)
    train(model, optimizer, compressor, range(4), batch)
    plain, other = untouched(kind)
    train(plain, other, None, range(2), batch)
    assert compressor.step_count == 2
    assert model[0].k_proj.out_features == HEADS * K
    assert model[0].expand_k == plain[0].expand_k
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert train(model, optimizer, compressor, range(1), batch) == train(plain, other, None, range(1), batch)


def test_inspect_and_data_free():
    for kind in KINDS:
        layer = lively(kind)
        inspection = compressm.inspect(layer).layers[0]
        assert [(s.convention, s.gramians) for s in inspection.spectra] == [("selective", "data-free")]
        assert inspection.slowest == (
            1 if kind == "none" else pytest.approx(1 - 2**-6) if kind == "fixed" else inspection.slowest
        )
        assert 0 < inspection.slowest <= 1
        assert compressm.compress(layer, compressm.FixedRank(2)).layers[0].gramians == "data-free"
        assert layer(data(1, 5)).isfinite().all()


def test_what_is_refused():
    half = compressm.FixedRank(3)
    with pytest.raises(ArgumentError, match=r"an even number, as channels turn .* in pairs, got 3"):
        compressm.compress(lively("scalar", rotary=True), half, multiple_of=1)
    with pytest.raises(ModelError, match=r"no norm takes out the scale.*pass scale="):
        compressm.compress(LinearAttention(8, d_conv=3, output_norm=False, output_gate=False), compressm.FixedRank(1))
    with pytest.raises(ArgumentError, match="no method"):
        compressm.compress(lively("scalar"), half, recipe="paper")
    with pytest.raises(ArgumentError, match="form: expected 'auto'"):
        compressm.compress(lively("scalar"), half, form="projected")
    layer = lively("scalar")
    nn.utils.parametrize.register_parametrization(layer.k_proj, "weight", nn.Identity())
    with pytest.raises(ModelError, match=r"k_proj\.weight is not a plain parameter.*merge adapters such as LoRA"):
        compressm.compress(layer, half)
    layer = lively("scalar")
    with torch.no_grad():
        layer.v_proj.weight[0] = torch.nan
    with pytest.raises(NumericalError, match=r"v_proj\.weight holds 8 NaN"):
        compressm.compress(layer, half)
    layer = lively("scalar")
    layer.num_heads = 5
    with pytest.raises(ModelError, match="expected numbers that divide"):
        compressm.compress(layer, half)


class Widened(LinearAttention):
    """A norm over keys."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.k_norm = nn.RMSNorm(self.head_k_dim)


def test_what_is_not_known_is_refused():
    with pytest.raises(ModelError, match=r"k_norm\.weight"):
        compressm.compress(Widened(8, 2, 1.5), compressm.FixedRank(3))


@pytest.mark.parametrize("name", linear_layers.FLA)
@pytest.mark.parametrize("kv", [4, 2])
def test_layers_of_flash_linear_attention(name, kv):
    """By their names: what is not used of queries is cut without a change, padding included."""
    if name == "GatedLinearAttention" and kv == 2:
        with pytest.raises(ModelError, match="num_kv_heads"):
            compressm.compress(getattr(linear_layers, name)(num_kv_heads=2), compressm.FixedRank(2))
        return
    torch.manual_seed(0)
    layer = getattr(linear_layers, name)(num_kv_heads=kv).double().requires_grad_(False)
    weight, x, mask = layer.q_proj.weight.view(4, 3, 8), data(2, 9), torch.ones(2, 9)
    weight[:, 2] = 0 if name == "GatedLinearAttention" else weight[:, 0] - weight[:, 1]
    mask[0, :3] = 0
    before, masked = layer(x), layer(x, attention_mask=mask)
    (report,) = compressm.compress(layer, compressm.FixedRank(2), calibration=[x], multiple_of=1).layers
    assert report.method == ("backward subset, queries predicted" if name.startswith("Gated") else "absorbed, balanced pair")
    assert (layer.head_k_dim, layer.key_dim, layer.key_dim_per_group) == (2, 8, 2 * kv)
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x, attention_mask=mask), masked, rtol=1e-5, atol=1e-5)


def test_padding_is_not_measured():
    layer, x, mask = linear_layers.GatedLinearAttention().double().requires_grad_(False), data(2, 9), torch.ones(2, 9)
    mask[0, :4] = 0
    everything = {"forward": lambda model, batch: model(batch, attention_mask=mask), "rows_per_state": None}
    both = measure(layer, [x], **everything)
    apart = [measure(layer, [part], rows_per_state=None) for part in (x[:1, 4:], x[1:])]
    torch.testing.assert_close(both.P, (5 * apart[0].P + 9 * apart[1].P) / 14)
    torch.testing.assert_close(both.Q, (5 * apart[0].Q + 9 * apart[1].Q) / 14)


def test_what_stands_in_the_way_in_flash_linear_attention():
    retention, rotary = linear_layers.MultiScaleRetention, linear_layers.RotaryEmbedding
    for layer, words in (
        (linear_layers.LinearAttention(feature_map="relu"), "feature map"),
        (retention(rotary=nn.Identity()), "turn with their position by a Identity, expected"),
        (retention(rotary=rotary(2, interleaved=True)), "of neighbouring channels"),
        (retention(rotary=rotary(2, scale_base=512)), r"with a scale \(xPos\)"),
    ):
        with pytest.raises(ModelError, match=words):
            compressm.compress(layer, compressm.FixedRank(2))


@pytest.mark.parametrize("weights", ["single", "fused"])
def test_xlstm(weights, tmp_path, assert_close):
    """A model of the library loses half of its key channels, is loaded again and decodes with its cache."""
    transformers = pytest.importorskip("transformers")
    from compressm.integrations.transformers import update_config

    torch.manual_seed(0)
    config = transformers.xLSTMConfig(
        vocab_size=23, hidden_size=64, num_hidden_layers=2, num_heads=2, qk_dim_factor=2.0, chunk_size=8, weight_mode="single",
        ffn_round_up_to_multiple_of=8, autocast_kernel_dtype="float32", use_bias=True,
    )  # fmt: skip
    config.weight_mode = weights
    model = transformers.xLSTMForCausalLM(config).eval() if weights == "single" else None
    if model is None:
        layer = transformers.models.xlstm.modeling_xlstm.xLSTMLayer(config)
        with torch.no_grad():
            layer.qkv_opreact.weight.normal_(std=0.3)
            rows = layer.qkv_opreact.weight[:128].view(2, 64, 64)
            rows[:, 32:] = rows[:, :32].flip(1)
            layer.qkv_opreact.bias[:128] = 0
            x = torch.randn(2, 17, 64)
            before = layer(x)[0]
            compressm.compress(layer, compressm.FixedRank(32), calibration=[x])
            assert layer.qk_dim == 64
            assert_close(layer(x)[0], before)
        return
    x = torch.randint(3, 23, (3, 17))
    with torch.no_grad():
        for block in model.backbone.blocks:
            part = block.mlstm_layer
            for name, parameter in part.named_parameters():
                if name[0] in "qkvif" and name.endswith("weight"):
                    parameter.normal_(std=0.3)
            part.igate_preact.bias.zero_()
            part.q.weight.view(2, 64, 64)[:, 32:] = part.q.weight.view(2, 64, 64)[:, :32].flip(1)
            part.q.bias.zero_()
        before = model(x).logits
        reports = compressm.compress(model, compressm.FixedRank(32), calibration=[x]).layers
        assert [report.method for report in reports] == ["absorbed, balanced pair"] * 2
        assert_close(model(x, use_cache=False).logits, before)
        with pytest.raises(ArgumentError, match=r"multiple of 32.*got 16"):
            compressm.compress(model, compressm.FixedRank(16), calibration=[x])
        update_config(model).save_pretrained(tmp_path)
        assert model.config.qk_dim_factor == 1.0
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(x).logits, model(x).logits)
        steps = again.generate(x, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)
        full = again(steps.sequences).logits[:, 16:-1]
        torch.testing.assert_close(torch.stack(steps.logits, 1), full, rtol=1e-3, atol=1e-4)
