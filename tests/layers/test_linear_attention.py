"""The layer of linear attention: its equations in plain torch, names of flash-linear-attention, decoding, packing, hooks."""

from __future__ import annotations

import itertools

import pytest
import torch
from layers.inference import InferenceParams, check_decoding, check_formula, decoded
from torch.nn import functional as F

from compressm.errors import ArgumentError
from compressm.layers import LinearAttention


def small(**options):
    torch.manual_seed(0)
    layer = LinearAttention(8, **{"num_heads": 2, "expand_k": 1.5, "expand_v": 2.0, "layer_idx": 0, **options}).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "norm" in name:
                parameter.normal_()
            elif "gk_proj" in name:  # decays that matter within a few steps
                parameter.mul_(4.0).sub_(0.3)
    return layer


def by_the_equations(layer, x):
    """A token at a time, every head by itself."""
    (B, L, _), H = x.shape, layer.num_heads
    parts = []
    for name in "qkv":
        part = F.linear(x, layer.get_parameter(f"{name}_proj.weight"))
        if layer.d_conv:
            taps = layer.get_submodule(f"{name}_conv1d")
            padded = F.pad(part, (0, 0, layer.d_conv - 1, 0))
            part = sum(padded[:, i : i + L] * taps.weight[:, 0, i] for i in range(layer.d_conv))
            part = F.silu(part if taps.bias is None else part + taps.bias)
        parts.append(part.unflatten(-1, (H, -1)))
    q, k, v = parts
    K, V = q.shape[-1], v.shape[-1]
    g = x.new_zeros(B, L, H, K)
    if layer.decay == "fixed":
        g = g + torch.log(1 - 2.0 ** (-5 - torch.arange(H)).to(x.dtype))[:, None]
    if layer.decay == "scalar":
        g = g + F.logsigmoid(F.linear(x, layer.gk_proj.weight, layer.gk_proj.bias))[..., None] / layer.gate_logit_normalizer
    if layer.decay == "channel":
        low = F.linear(x, layer.gk_proj[0].weight)
        g = F.logsigmoid(F.linear(low, layer.gk_proj[1].weight, layer.gk_proj[1].bias)) / layer.gate_logit_normalizer
        g = g.unflatten(-1, (H, K))
    if layer.inv_freq is not None:  # pairs of channels as complex numbers
        turn = torch.polar(torch.ones((), dtype=x.dtype), torch.arange(L)[:, None, None] * layer.inv_freq)
        turned = (torch.complex(*part.chunk(2, -1)) * turn for part in (q, k))
        q, k = (torch.cat([part.real, part.imag], -1) for part in turned)
    S, outputs = x.new_zeros(B, H, K, V), []
    for t in range(L):
        S = g[:, t].exp()[..., None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, :, None] * S).sum(-2) * (K**-0.5 if layer.scale is None else layer.scale))
    out = torch.stack(outputs, 1)
    if layer.output_norm:
        out = out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.g_norm.weight
    if layer.output_gate:
        out = out * F.silu(F.linear(x, layer.g_proj.weight)).unflatten(-1, (H, V))
    return F.linear(out.flatten(2), layer.o_proj.weight)


OPTIONS = [
    {},
    {"decay": "none", "output_norm": False, "output_gate": False, "scale": 0.3},
    {"decay": "fixed", "rotary": True},
    {"decay": "scalar", "d_conv": 4, "conv_bias": True},
    {"decay": "channel", "output_gate": False, "gate_low_rank_dim": 3},
    {"decay": "channel", "d_conv": 2, "gate_logit_normalizer": 2.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_the_equations(assert_close, options):
    layer, x = small(**options), torch.randn(2, 11, 8, dtype=torch.float64)
    if layer.log_decay is not None:  # both were rounded to float32
        layer.log_decay = torch.log(1 - 2.0 ** (-5 - torch.arange(2)).double())
    check_formula(layer, by_the_equations, x, assert_close)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float32_runs_on_kernels_and_agrees(assert_close, options):
    layer, x = small(**options), torch.randn(2, 33, 8, dtype=torch.float64)
    single = LinearAttention(8, **{"num_heads": 2, "expand_k": 1.5, "expand_v": 2.0, **options})
    single.load_state_dict(layer.state_dict())
    assert single.kernel_plan is None
    assert_close(single(x.float()).detach(), by_the_equations(layer, x).detach())
    assert single.kernel_plan.op == "linear_attention"
    assert single.kernel_plan.form == ("walk" if layer.decay == "channel" else "chunks")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_prefill_and_decode_agree_with_the_whole_sequence(assert_close, options):
    layer, x = small(**options), torch.randn(2, 12, 8, dtype=torch.float64)
    check_decoding(layer, x, assert_close)


@pytest.mark.parametrize("d_conv", [0, 3])
def test_step_from_an_empty_cache(assert_close, d_conv):
    layer, x = small(d_conv=d_conv), torch.randn(3, 6, 8, dtype=torch.float64)
    shapes = [tuple(state.shape) for state in layer.allocate_inference_cache(3)]
    assert shapes == [(3, 40 if d_conv else 0, d_conv), (3, 2, 6, 8)]
    assert_close(decoded(layer, x).detach(), layer(x).detach())


@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize("options", OPTIONS[2:], ids=str)
def test_packed_sequences_do_not_see_each_other(assert_close, options, numbered):
    layer, x = small(**options), torch.randn(1, 14, 8, dtype=torch.float64)
    bounds = [0, 1, 6, 14]
    expected = torch.cat([layer(x[:, a:b]) for a, b in itertools.pairwise(bounds)], 1).detach()
    if numbered:
        numbers = torch.tensor([[0] + [1] * 5 + [2] * 8])
        both = layer(torch.cat([x, x]), seq_idx=torch.cat([numbers, numbers]))
        assert_close(both.detach(), expected.expand(2, -1, -1))
    else:
        assert_close(layer(x, cu_seqlens=torch.tensor(bounds)).detach(), expected)


def test_names_and_shapes_are_those_of_flash_linear_attention():
    shared = {
        "q_proj.weight": (12, 8), "k_proj.weight": (12, 8), "v_proj.weight": (16, 8), "g_proj.weight": (16, 8),
        "o_proj.weight": (8, 16), "g_norm.weight": (8,),
    }  # fmt: skip
    own = {
        "none": {}, "fixed": {}, "scalar": {"gk_proj.weight": (2, 8), "gk_proj.bias": (2,)},
        "channel": {"gk_proj.0.weight": (16, 8), "gk_proj.1.weight": (12, 16), "gk_proj.1.bias": (12,)},
    }  # fmt: skip
    for decay, more in own.items():
        shapes = {name: tuple(t.shape) for name, t in small(decay=decay, rotary=decay == "fixed").state_dict().items()}
        assert shapes == shared | more
    taps = {f"{name}_conv1d.weight": (width, 1, 4) for name, width in (("q", 12), ("k", 12), ("v", 16))}
    assert {name: tuple(t.shape) for name, t in small(d_conv=4).state_dict().items()} == shared | own["scalar"] | taps


@pytest.mark.parametrize("name", ["g_norm_swish_gate.weight", "norm.weight"])
def test_the_norms_weight_has_other_names(name):
    layer = small()
    checkpoint = small().state_dict()
    checkpoint[name] = 2 * checkpoint.pop("g_norm.weight")
    layer.load_state_dict(checkpoint)
    assert torch.equal(layer.g_norm.weight, checkpoint[name])
    with pytest.raises(RuntimeError, match="Unexpected"):
        small(output_norm=False, output_gate=False).load_state_dict(checkpoint)


def test_half_precision_and_autocast():
    layer, x = small(decay="channel", d_conv=3), torch.randn(2, 9, 8, dtype=torch.float64)
    expected = layer(x).detach()
    options = {"decay": "channel", "d_conv": 3, "num_heads": 2, "expand_k": 1.5, "expand_v": 2.0}
    half = LinearAttention(8, **options, dtype=torch.bfloat16)
    half.load_state_dict(layer.state_dict())
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).norm() < 4e-2 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer.float()(x.float())
    assert (y.double() - expected).norm() < 4e-2 * expected.norm()


def test_fixed_decays_and_frequencies_keep_their_digits():
    layer = LinearAttention(8, num_heads=2, decay="fixed", rotary=True)
    decays, frequencies = layer.log_decay.clone(), layer.inv_freq.clone()
    layer.bfloat16()
    assert layer.q_proj.weight.dtype == torch.bfloat16
    assert torch.equal(layer.log_decay, decays)
    assert torch.equal(layer.inv_freq, frequencies)
    assert layer(torch.randn(2, 5, 8).bfloat16()).dtype == torch.bfloat16
    assert layer.double().log_decay.dtype == torch.float64
    assert torch.equal(layer.float().log_decay, decays)


@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "g_proj", "gk_proj", "g_norm", "o_proj", "k_conv1d"])
def test_hooks_on_sub_modules_act(name, decay):
    layer, x = small(decay=decay, d_conv=3), torch.randn(2, 6, 8, dtype=torch.float64)
    before = layer(x).detach()
    layer.get_submodule(name).register_forward_hook(lambda module, args, out: 1.25 * out + 0.5)
    changed = layer(x)
    assert (changed - before).norm() > 1e-2 * before.norm()
    torch.testing.assert_close(decoded(layer, x), changed)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"decay": "channel", "d_conv": 3}, {"decay": "fixed", "rotary": True}], ids=str)
def test_compiles_without_graph_breaks(assert_close, options):
    layer, x = LinearAttention(8, num_heads=2, **options), torch.randn(2, 9, 8)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert_close(y.detach(), layer(x).detach().double(), dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_heads": 0}, "num_heads"), ({"num_heads": 3}, "expand_k"), ({"expand_v": 0.1}, "expand_v"),
        ({"decay": "exponential"}, "decay"), ({"d_conv": -1}, "d_conv"), ({"output_norm": False}, "output_gate"),
        ({"expand_k": 0.75, "rotary": True}, "expand_k"), ({"decay": "channel", "rotary": True}, "rotary"),
        ({"gate_low_rank_dim": 0}, "gate_low_rank_dim"),
    ],
)  # fmt: skip
def test_wrong_options(options, name):
    with pytest.raises(ArgumentError, match=rf"^{name}: expected"):
        LinearAttention(8, **{"num_heads": 2, **options})


def test_wrong_calls():
    layer, x = small(), torch.randn(2, 6, 8, dtype=torch.float64)
    states = layer.allocate_inference_cache(2)
    with pytest.raises(ArgumentError, match="hidden_states"):
        layer(x[..., :7])
    with pytest.raises(ArgumentError, match="one token"):
        layer.step(x, *states)
    with pytest.raises(ArgumentError, match="ssm_state"):
        layer.step(x[:, :1], states[0], states[1].mT)
    layer.layer_idx = None
    with pytest.raises(ArgumentError, match="layer_idx"):
        layer(x, InferenceParams())
