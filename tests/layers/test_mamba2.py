"""The Mamba-2 layer: the recurrence in plain torch, names of mamba_ssm, transformers' mixer, decoding, packing, maps."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from layers.inference import InferenceParams, check_compiled, check_decoding, check_formula, decoded
from torch.nn import functional as F

from compressm.errors import ArgumentError
from compressm.layers import Mamba2
from compressm.layers.gated_norm import GatedRMSNorm


def small(**options):
    torch.manual_seed(0)
    layer = Mamba2(8, **{"d_state": 5, "headdim": 4, "layer_idx": 0, **options}).double()
    with torch.no_grad():  # an untrained scan hardly moves: larger steps and random skips show every path
        layer.dt_bias.add_(2.0)
        layer.A_log.sub_(1.5)
        layer.D.normal_()
        if layer.rmsnorm:
            layer.norm.weight.normal_()
        if layer.B_map is not None:
            layer.C_map.add_(0.3 * torch.randn_like(layer.C_map))
    return layer


def by_the_equations(layer, x):
    """A token at a time, in plain torch, every head with its own copies of B and C."""
    G, N, H, P = layer.ngroups, layer.d_features or layer.d_state, layer.nheads, layer.headdim
    mlp, inner = layer.d_inner - layer.d_ssm, layer.d_ssm + 2 * G * N
    projected = F.linear(x, layer.in_proj.weight, layer.in_proj.bias)
    z0, x0, z, xBC, dt = projected.split([mlp, mlp, layer.d_ssm, inner, H], -1)
    bias = 0 if layer.conv1d.bias is None else layer.conv1d.bias
    padded = F.pad(xBC, (0, 0, layer.d_conv - 1, 0))
    taps = layer.conv1d.weight[:, 0]
    xBC = F.silu(sum(padded[:, k : k + x.shape[1]] * taps[:, k] for k in range(layer.d_conv)) + bias)
    u, B, C = xBC.split([layer.d_ssm, G * N, G * N], -1)
    u, B, C = u.unflatten(-1, (H, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
    if layer.d_features is not None:
        B, C = ((part[..., None, :] * maps).sum(-1) for part, maps in ((B, layer.B_map), (C, layer.C_map)))
    B, C = (part.repeat_interleave(H // G, 2) for part in (B, C))
    dt = F.softplus(dt + layer.dt_bias).clamp(*layer.dt_limit)
    D = layer.D.view(H, -1)
    h = torch.zeros(x.shape[0], H, P, layer.d_state, dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * -layer.A_log.exp())[..., None, None]
        h = decay * h + (dt[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None, :]
        outputs.append((h * C[:, t, :, None, :]).sum(-1) + D * u[:, t])
    y = torch.stack(outputs, 1).flatten(2)
    if not layer.rmsnorm:
        y = y * F.silu(z)
    else:
        y = y if layer.norm_before_gate else y * F.silu(z)
        parts = y.unflatten(-1, (G, -1))
        y = (parts / (parts.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * layer.norm.weight
        y = y * F.silu(z) if layer.norm_before_gate else y
    y = torch.cat([F.silu(z0) * x0, y], -1)
    return F.linear(y, layer.out_proj.weight, layer.out_proj.bias)


OPTIONS = [
    {},
    {"conv_bias": False, "bias": True, "ngroups": 2},
    {"expand": 3, "d_ssm": 16, "d_conv": 2, "ngroups": 4},
    {"rmsnorm": False, "D_has_hdim": True},
    {"norm_before_gate": True, "ngroups": 2, "d_conv": 1},
    {"dt_limit": (0.5, 2.0), "headdim": 1},
    {"d_features": 7, "ngroups": 2},
    {"d_features": 5},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_the_recurrence(assert_close, options):
    layer, x = small(**options), torch.randn(2, 11, 8, dtype=torch.float64)
    check_formula(layer, by_the_equations, x, assert_close)


def test_float32_runs_in_chunks_and_agrees(assert_close):
    layer, x = small(d_state=13), torch.randn(2, 33, 8, dtype=torch.float64)
    expected = layer(x).detach()
    single = Mamba2(8, d_state=13, headdim=4)
    single.load_state_dict(layer.state_dict())
    assert_close(single(x.float()).detach(), expected)
    assert single.kernel_plan.form == "chunks"


def test_the_plan_follows_the_states():
    layer = small()
    assert layer.kernel_plan is None
    layer(torch.randn(2, 300, 8, dtype=torch.float64))
    assert layer.kernel_plan.op == "ssd"
    layer.eval()
    layer(torch.randn(1, 4, 8, dtype=torch.float64))
    assert layer._last_call[2:] == (2, 300)


def test_names_and_shapes_are_those_of_mamba_ssm():
    layer = Mamba2(32, d_state=16, headdim=8, ngroups=2)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "dt_bias": (8,), "A_log": (8,), "D": (8,), "in_proj.weight": (200, 32), "conv1d.weight": (128, 1, 4),
        "conv1d.bias": (128,), "norm.weight": (64,), "out_proj.weight": (32, 64),
    }  # fmt: skip
    assert all(parameter._no_weight_decay for parameter in (layer.dt_bias, layer.A_log, layer.D))
    projected = Mamba2(32, d_state=4, headdim=8, ngroups=2, d_features=16)
    assert {name: tuple(p.shape) for name, p in projected.named_parameters()} == {
        **shapes, "B_map": (2, 4, 16), "C_map": (2, 4, 16),
    }  # fmt: skip
    assert (projected.d_state, projected.d_features) == (4, 16)
    assert projected.B_map._no_weight_decay


def test_initialisation():
    layer = Mamba2(1024, d_state=3, headdim=4, dt_min=0.002, dt_max=0.05, A_init_range=(2, 5), conv_init=0.1)
    dt = F.softplus(layer.dt_bias)
    assert 0.002 * 0.999 <= dt.min() < 0.003
    assert 0.04 < dt.max() <= 0.05 * 1.001
    assert 2 <= layer.A_log.exp().min() < 2.2
    assert 4.8 < layer.A_log.exp().max() <= 5.001
    assert 0.09 < layer.conv1d.weight.abs().max() <= 0.1
    half = Mamba2(8, headdim=4, dtype=torch.bfloat16)
    assert {half.A_log.dtype, half.D.dtype, half.dt_bias.dtype} == {torch.float32}


def test_maps_begin_orthogonal(assert_close):
    layer = Mamba2(8, d_state=2, headdim=4, ngroups=2, d_features=8)
    for maps in (layer.B_map, layer.C_map):
        assert_close((maps @ maps.mT).detach(), 2 * torch.eye(2).double().expand(2, 2, 2))
    assert torch.equal(layer.B_map, layer.C_map)
    assert not torch.equal(layer.B_map[0], layer.B_map[1])


def test_a_checkpoint_without_maps_is_the_same_layer(assert_close):
    plain, x = small(ngroups=2), torch.randn(2, 9, 8, dtype=torch.float64)
    mapped = small(ngroups=2, d_features=5)
    assert not mapped.B_map.equal(mapped.C_map)
    mapped.load_state_dict(plain.state_dict())
    assert_close(mapped(x).detach(), plain(x).detach())
    changed = mapped.state_dict()
    changed["C_map"] = changed["C_map"] * 2
    mapped.load_state_dict(changed)
    assert torch.equal(mapped.C_map, changed["C_map"])
    with pytest.raises(RuntimeError, match=r"Missing key.*B_map"):
        small(d_state=3, ngroups=2, d_features=5).load_state_dict(plain.state_dict())


@pytest.mark.parametrize(
    "options", [{}, {"dt_limit": (0.5, 2.0), "rmsnorm": False}, {"d_features": 7, "ngroups": 2}, OPTIONS[2]]
)
def test_prefill_and_decode_agree_with_the_whole_sequence(assert_close, options):
    layer, x = small(**options), torch.randn(2, 12, 8, dtype=torch.float64)
    check_decoding(layer, x, assert_close)


def test_step_from_an_empty_cache(assert_close):
    layer, x = small(D_has_hdim=True), torch.randn(3, 6, 8, dtype=torch.float64)
    assert [tuple(state.shape) for state in layer.allocate_inference_cache(3)] == [(3, 26, 4), (3, 4, 4, 5)]
    assert_close(decoded(layer, x).detach(), layer(x).detach())


@pytest.mark.parametrize("numbered", [True, False])
def test_packed_sequences_do_not_see_each_other(assert_close, numbered):
    layer, x = small(ngroups=2), torch.randn(1, 14, 8, dtype=torch.float64)
    bounds = [0, 1, 6, 14]
    expected = torch.cat([layer(x[:, a:b]) for a, b in itertools.pairwise(bounds)], 1).detach()
    if numbered:
        numbers = torch.tensor([[0] + [1] * 5 + [2] * 8])
        both = layer(torch.cat([x, x]), seq_idx=torch.cat([numbers, numbers]))
        assert_close(both.detach(), expected.expand(2, -1, -1))
    else:
        assert_close(layer(x, cu_seqlens=torch.tensor(bounds)).detach(), expected)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_the_length_of_chunks_changes_nothing(assert_close, chunk):
    layer, x = small().float(), torch.randn(2, 10, 8)
    expected = by_the_equations(small(), x.double()).detach()
    layer.chunk_size = chunk
    assert_close(layer(x).detach(), expected)


def test_half_precision_and_autocast():
    layer, x = small(d_features=7), torch.randn(2, 9, 8, dtype=torch.float64)
    expected = layer(x).detach()
    half = Mamba2(8, d_state=5, headdim=4, d_features=7, dtype=torch.bfloat16)
    half.load_state_dict(layer.state_dict())
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).norm() < 3e-2 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer.float()(x.float())
    assert (y.double() - expected).norm() < 3e-2 * expected.norm()


@pytest.mark.parametrize("groups", [1, 2])
def test_it_is_transformers_mixer(assert_close, groups):
    """In float32, as theirs computes nothing wider; training, prompt and decoding."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = transformers.Mamba2Config(
        hidden_size=8, num_heads=4, head_dim=4, state_size=5, n_groups=groups, expand=2, chunk_size=4, num_hidden_layers=1,
        use_bias=True,
    )  # fmt: skip
    torch.manual_seed(1)
    theirs, ours = Mamba2Mixer(config, 0), Mamba2(8, d_state=5, headdim=4, ngroups=groups, bias=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 11, 8)
    expected, got = theirs(x), ours(x)
    assert_close(got.detach(), expected.detach().double())
    for y in (expected, got):
        y.square().sum().backward()
    for name, parameter in theirs.named_parameters():
        assert_close(ours.get_parameter(name).grad, parameter.grad.double(), name)
    cache, params = transformers.DynamicCache(config=config), InferenceParams()
    ours.layer_idx = 0
    for begin, end in ((0, 9), (9, 10), (10, 11)):
        params.seqlen_offset = begin
        part = ours(x[:, begin:end], inference_params=params)
        assert_close(part.detach(), theirs(x[:, begin:end], cache).detach().double())


@pytest.mark.slow
def test_compiles_without_graph_breaks(assert_close):
    check_compiled(Mamba2(8, d_state=5, headdim=4, d_features=6), torch.randn(2, 9, 8), assert_close)


@pytest.mark.parametrize("name", ["in_proj", "out_proj", "norm", "conv1d"])
def test_hooks_on_sub_modules_act(name):
    layer, x = small(), torch.randn(2, 6, 8, dtype=torch.float64)
    before = layer(x)
    getattr(layer, name).register_forward_hook(lambda module, args, out: 1.25 * out)
    changed = layer(x)
    assert (changed - before).norm() > 1e-2 * before.norm()
    torch.testing.assert_close(decoded(layer, x), changed)


@pytest.mark.parametrize(("before", "groups"), [(True, 1), (False, 3)])
def test_the_norm_in_half_precision(before, groups):
    norm = GatedRMSNorm(12, groups, norm_before_gate=before)
    with torch.no_grad():
        norm.weight.normal_()
    x, z = torch.randn(2, 5, 12).bfloat16(), torch.randn(2, 5, 12).bfloat16()
    wide = norm.double()(x.double(), z.double())
    got = norm.float()(x, z)
    assert got.dtype == torch.bfloat16
    assert (got - wide).norm() < 4e-3 * wide.norm()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"d_state": 0}, "d_state"), ({"headdim": 5}, "headdim"), ({"ngroups": 3}, "ngroups"), ({"d_ssm": 17}, "d_ssm"),
        ({"d_features": 4}, "d_features"), ({"d_features": True}, "d_features"), ({"dt_limit": (2.0, 1.0)}, "dt_limit"),
        ({"A_init_range": (0, 1)}, "A_init_range"), ({"dt_min": 0.0}, "dt_min, dt_max"),
        ({"process_group": object()}, "process_group"),
        ({"dt_limit": 3.0}, "dt_limit"), ({"dt_limit": (0.1,)}, "dt_limit"), ({"dt_limit": (math.inf, math.inf)}, "dt_limit"),
        ({"A_init_range": (1, math.inf)}, "A_init_range"), ({"A_init_range": None}, "A_init_range"),
        ({"dt_max": math.inf}, "dt_min, dt_max"), ({"dt_min": "a"}, "dt_min, dt_max"),
        ({"dt_init_floor": -1.0}, "dt_init_floor"),
        ({"expand": math.nan}, "expand"), ({"expand": "2"}, "expand"), ({"conv_init": -1.0}, "conv_init"),
        ({"chunk_size": 0}, "chunk_size"), ({"d_ssm": 8.0}, "d_ssm"), ({"d_ssm": -4}, "d_ssm"),
    ],
)  # fmt: skip
def test_wrong_options(options, name):
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        Mamba2(8, **{"d_state": 5, "headdim": 4, **options})


def test_wrong_calls():
    layer, x = small(), torch.randn(2, 6, 8, dtype=torch.float64)
    states = layer.allocate_inference_cache(2)
    numbers = torch.zeros(2, 6, dtype=torch.int64)
    with pytest.raises(ArgumentError, match="hidden_states"):
        layer(x[..., :7])
    with pytest.raises(ArgumentError, match="one token"):
        layer.step(x, *states)
    with pytest.raises(ArgumentError, match="ssm_state"):
        layer.step(x[:, :1], states[0], states[1][:1])
    for wrong in (x[..., 0].long(), x.long(), x + 0j, None):
        with pytest.raises(ArgumentError, match=r"hidden_states: expected .*\(batch, length, 8\)"):
            layer(wrong)
    for wrong in (numbers[:, :5], numbers > 0, numbers.double()):
        with pytest.raises(ArgumentError, match="seq_idx"):
            layer(x, seq_idx=wrong)
    with pytest.raises(ArgumentError, match="one of them"):
        layer(x, seq_idx=numbers, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ArgumentError, match="inference_params"):
        layer(x, InferenceParams(), seq_idx=numbers)
    prompt = InferenceParams()
    layer(x, prompt)
    with pytest.raises(ArgumentError, match=r"conv_state: expected \(1, "):
        layer(x[:1], prompt)
    layer.layer_idx = None
    with pytest.raises(ArgumentError, match="layer_idx"):
        layer(x, InferenceParams())
