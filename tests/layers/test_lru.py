"""The LRU layer: golden values, streaming, initialisation, half precision, torch.compile."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from compressm.errors import ArgumentError
from compressm.layers import LRU, S5

GOLDEN = ["lru_N16_H4_L64", "lru_N32_H16_L64", "lru_N64_H8_L64"]
PARAMETERS = ["nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im", "D"]


def layer_from(g, dtype):
    layer = LRU(g["D"].shape[0], g["nu_log"].shape[0], dtype=dtype)
    layer.load_state_dict({name: g[name] for name in PARAMETERS})
    return layer


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden(golden, assert_close, name, dtype):
    g = golden(name)
    layer, x = layer_from(g, dtype), g["x"].to(dtype).requires_grad_()
    y = layer(x[None])[0]
    assert_close(y.detach(), g["y"], "y")
    (y * g["w"].to(dtype)).sum().backward()
    assert_close(x.grad, g["grad_x"], "x")
    for parameter in PARAMETERS:
        assert_close(getattr(layer, parameter).grad, g[f"grad_{parameter}"], parameter)


def test_golden_reduced_parameters(golden, assert_close):
    g = golden("lru_N32_H16_L64")
    reduced = {name: g[f"red_{name}"] for name in PARAMETERS if f"red_{name}" in g}
    layer = layer_from({**g, **reduced}, torch.float64)
    assert layer.d_state == int(g["red_rank"])
    assert_close(layer(g["x"][None])[0].detach(), g["red_y"], "red_y")


def test_streaming_equals_the_sequence(assert_close):
    layer, x = LRU(3, 7, dtype=torch.float64), torch.randn(2, 11, 3, dtype=torch.float64)
    y, last = layer(x, return_last_state=True)
    state = layer.initial_state(2)
    steps = []
    for t in range(11):
        out, state = layer.step(x[:, t], state)
        steps.append(out)
    assert_close(torch.stack(steps, 1).detach(), y.detach())
    assert_close(state.detach(), last.detach(), dtype=torch.float64)
    continued = layer(x, initial_state=last)
    assert_close(layer(torch.cat([x, x], 1))[:, 11:].detach(), continued.detach())


def test_initialisation_is_on_the_ring():
    layer = LRU(4, 4000, r_min=0.5, r_max=0.9, max_phase=0.314)
    modulus, phase = torch.exp(-layer.nu_log.exp()), layer.theta_log.exp()
    assert modulus.min() >= 0.5 - 1e-6
    assert modulus.max() <= 0.9 + 1e-6
    assert phase.max() <= 0.314 + 1e-6
    # uniform on the ring's area: the median radius halves the area
    assert abs(modulus.median().item() - math.sqrt((0.25 + 0.81) / 2)) < 0.02
    torch.testing.assert_close(layer.gamma_log.exp(), torch.sqrt(1 - modulus**2), rtol=1e-4, atol=1e-5)


def test_autocast_and_bfloat16_parameters():
    layer, x = LRU(4, 6), torch.randn(2, 20, 4)
    y = layer(x)
    half = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - y).norm() < 0.05 * y.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = layer(x)
    assert (mixed.float() - y).norm() < 0.02 * y.norm()


@pytest.mark.slow
def test_compiles_into_one_graph():
    layer, x = LRU(4, 6), torch.randn(2, 48, 4)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert layer.nu_log.grad.isfinite().all()


def test_reports_the_kernel_plan():
    layer = LRU(4, 6)
    assert layer.kernel_plan is None
    layer(torch.zeros(50, 784, 4))
    training = layer.kernel_plan
    assert (training.op, training.form) == ("lti_scan", "block")
    layer.eval()(torch.zeros(1, 1, 4))
    assert layer.kernel_plan is training
    layer.train()(torch.zeros(1, 1, 4))
    assert layer.kernel_plan.form == "scan"


def test_the_kernel_plan_follows_the_number_of_states():
    layer = LRU(8, 256)
    layer(torch.zeros(50, 784, 8))
    before = layer.kernel_plan
    for name, shape in layer.parameter_shapes(28).items():
        setattr(layer, name, torch.nn.Parameter(torch.zeros(shape)))
    assert layer.kernel_plan.get("tau") < before.get("tau")


@pytest.mark.parametrize(
    "arguments",
    [{"d_model": 0}, {"d_state": 0}, {"r_min": 0.99, "r_max": 0.9}, {"r_max": 1.0}, {"max_phase": 7.0}],
)
def test_wrong_constructor_arguments(arguments):
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        LRU(**{"d_model": 4, "d_state": 4, **arguments})


def test_wrong_input_shapes():
    layer = LRU(4, 6)
    with pytest.raises(ArgumentError, match="x:"):
        layer(torch.zeros(5, 4))
    with pytest.raises(ArgumentError, match="x:"):
        layer(torch.zeros(1, 5, 3))
    with pytest.raises(ArgumentError, match="state:"):
        layer.step(torch.zeros(1, 4), torch.zeros(1, 5, dtype=torch.cfloat))


@pytest.mark.parametrize("kind", [LRU, S5])
@pytest.mark.parametrize("states", [1.5, 0, True, "16"])
def test_states_are_a_whole_number(kind, states):
    with pytest.raises(ArgumentError, match="d_state: expected an integer, at least 1, got"):
        kind(4, states)
