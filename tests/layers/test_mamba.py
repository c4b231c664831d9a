"""The Mamba layer: the paper's equations, mamba_ssm's names and initialisation, prefill and decode, torch.compile."""

from __future__ import annotations

import pytest
import torch
from layers.inference import InferenceParams, check_compiled, check_decoding, check_formula, decoded
from torch.nn import functional as F

from compressm.errors import ArgumentError
from compressm.layers import Mamba


def small(**options):
    torch.manual_seed(0)
    layer = Mamba(6, **{"d_state": 5, "layer_idx": 0, **options}).double()
    with torch.no_grad():  # an untrained scan hardly moves: larger steps and random skips show every path
        layer.dt_proj.bias.add_(2.0)
        layer.D.normal_()
    return layer


def by_the_equations(layer, x):
    """Section 3 of the paper, a token at a time, in plain torch."""
    u, z = F.linear(x, layer.in_proj.weight, layer.in_proj.bias).chunk(2, -1)
    bias = 0 if layer.conv1d.bias is None else layer.conv1d.bias
    padded = F.pad(u, (0, 0, layer.d_conv - 1, 0))
    taps = layer.conv1d.weight[:, 0]
    u = F.silu(sum(padded[:, k : k + x.shape[1]] * taps[:, k] for k in range(layer.d_conv)) + bias)
    low_rank, B, C = (u @ layer.x_proj.weight.T).split([layer.dt_rank, layer.d_state, layer.d_state], -1)
    dt = F.softplus(low_rank @ layer.dt_proj.weight.T + layer.dt_proj.bias)
    h = torch.zeros(x.shape[0], layer.d_inner, layer.d_state, dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * -layer.A_log.exp()) * h + (dt * u)[:, t, :, None] * B[:, t, None, :]
        y = (h * C[:, t, None, :]).sum(-1) + layer.D * u[:, t]
        outputs.append(y * F.silu(z[:, t]))
    return F.linear(torch.stack(outputs, 1), layer.out_proj.weight, layer.out_proj.bias)


@pytest.mark.parametrize(
    "options", [{}, {"conv_bias": False, "bias": True}, {"expand": 1.5, "d_conv": 2, "dt_rank": 3}, {"d_conv": 1}]
)
def test_it_is_the_paper(assert_close, options):
    layer, x = small(**options), torch.randn(2, 11, 6, dtype=torch.float64)
    check_formula(layer, by_the_equations, x, assert_close)


def test_float32_runs_a_compiled_kernel_and_agrees(assert_close):
    layer, x = small(d_state=13), torch.randn(2, 33, 6, dtype=torch.float64)
    expected = layer(x).detach()
    single = Mamba(6, d_state=13)
    single.load_state_dict(layer.state_dict())
    assert_close(single(x.float()).detach(), expected)
    assert single.kernel_plan.backend != "reference"


def test_names_and_shapes_are_those_of_mamba_ssm():
    layer = Mamba(32, d_state=16)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "A_log": (64, 16), "D": (64,), "in_proj.weight": (128, 32), "conv1d.weight": (64, 1, 4), "conv1d.bias": (64,),
        "x_proj.weight": (34, 64), "dt_proj.weight": (64, 2), "dt_proj.bias": (64,), "out_proj.weight": (32, 64),
    }  # fmt: skip
    assert layer.A_log._no_weight_decay
    assert layer.D._no_weight_decay


def test_initialisation():
    layer = Mamba(256, d_state=7, dt_min=0.002, dt_max=0.05)
    dt = F.softplus(layer.dt_proj.bias)
    assert 0.002 * 0.999 <= dt.min() < 0.003
    assert 0.04 < dt.max() <= 0.05 * 1.001
    torch.testing.assert_close(layer.A_log.exp(), torch.arange(1.0, 8.0).expand(512, 7))
    assert layer.dt_proj.weight.abs().max() <= 16**-0.5
    assert Mamba(4, dt_init="constant").dt_proj.weight.unique().numel() == 1
    assert Mamba(4, dtype=torch.bfloat16).A_log.dtype == torch.float32


def test_prefill_and_decode_agree_with_the_whole_sequence(assert_close):
    layer, x = small(), torch.randn(2, 12, 6, dtype=torch.float64)
    check_decoding(layer, x, assert_close)


def test_step_from_an_empty_cache(assert_close):
    layer, x = small(), torch.randn(3, 6, 6, dtype=torch.float64)
    assert_close(decoded(layer, x).detach(), layer(x).detach())


def test_more_taps_than_the_kernels_have(assert_close):
    layer, x = Mamba(6, d_state=3, d_conv=11), torch.randn(2, 17, 6)
    y = layer(x)
    assert_close(decoded(layer, x).detach(), y.detach().double())
    assert_close(y.detach(), layer.double()(x.double()).detach())


def test_half_precision_and_autocast(assert_close):
    layer, x = small(), torch.randn(2, 9, 6, dtype=torch.float64)
    expected = layer(x).detach()
    half = Mamba(6, d_state=5, dtype=torch.bfloat16)
    half.load_state_dict(layer.state_dict())
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).norm() < 3e-2 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer.float()(x.float())
    assert (y.double() - expected).norm() < 3e-2 * expected.norm()


@pytest.mark.slow
def test_compiles_without_graph_breaks(assert_close):
    check_compiled(Mamba(8, d_state=5), torch.randn(2, 9, 8), assert_close)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"d_model": 0}, "d_model"),
        ({"d_state": 0}, "d_state"),
        ({"d_conv": 0}, "d_conv"),
        ({"expand": 0.1}, "expand"),
        ({"dt_rank": "max"}, "dt_rank"),
        ({"dt_init": "zero"}, "dt_init"),
        ({"dt_min": 0.0}, "dt_min"),
    ],
)
def test_wrong_settings_are_named(options, name):
    with pytest.raises(ArgumentError, match=rf"^{name}"):
        Mamba(**{"d_model": 6, **options})


def test_wrong_calls_are_named():
    layer = small()
    with pytest.raises(ArgumentError, match=r"^hidden_states:"):
        layer(torch.zeros(2, 3, 5))
    conv, ssm = layer.allocate_inference_cache(2)
    with pytest.raises(ArgumentError, match=r"^hidden_states:"):
        layer.step(torch.zeros(2, 2, 6), conv, ssm)
    with pytest.raises(ArgumentError, match=r"^conv_state:"):
        layer.step(torch.zeros(2, 1, 6), conv[:1], ssm)
    with pytest.raises(ArgumentError, match=r"^ssm_state:"):
        layer.step(torch.zeros(2, 1, 6), conv, ssm[..., 1:])
    layer.layer_idx = None
    with pytest.raises(ArgumentError, match=r"^layer_idx:"):
        layer(torch.zeros(2, 1, 6), inference_params=InferenceParams())
