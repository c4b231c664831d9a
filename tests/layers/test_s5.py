"""The S5 layer: the published recurrence, streaming, both directions, HiPPO initialisation."""

from __future__ import annotations

import math

import pytest
import torch

from compressm.errors import ArgumentError
from compressm.layers import S5
from compressm.layers._discretization import DISCRETIZATIONS, continuous, zoh
from compressm.layers.s5 import hippo_normal

VARIANTS = [{}, {"conj_sym": True, "discretization": "bilinear"}, {"bidir": True, "shared_step": True, "step_scale": 2.0}]


def make(d_model=3, d_state=6, **options) -> S5:
    return S5(d_model, d_state, **{"dtype": torch.float64, "block_count": 2, **options})


def published(layer: S5, x: torch.Tensor) -> torch.Tensor:
    """S5SSM's forward pass, step by step, its discretization as it writes it, and 2 Re(C x) for the JAX code's conj_sym."""
    step, Lambda, B = layer.step_scale * layer.log_step.exp(), layer.Lambda, torch.view_as_complex(layer.B)
    if layer.discretization == "zoh":
        lam = torch.exp(Lambda * step)
        B_bar = (1 / Lambda * (lam - 1))[:, None] * B
    else:
        BL = 1 / (1 - step / 2 * Lambda)
        lam, B_bar = BL * (1 + step / 2 * Lambda), (BL * step)[:, None] * B

    def states(x):
        state, found = torch.zeros(len(x), len(lam), dtype=lam.dtype), []
        for t in range(x.shape[1]):
            state = lam * state + x[:, t].to(lam.dtype) @ B_bar.T
            found.append(state)
        return torch.stack(found, 1)

    seen = states(x)
    if layer.bidir:
        seen = torch.cat([seen, states(x.flip(1)).flip(1)], -1)
    return (2 if layer.conj_sym else 1) * (seen @ layer.C.T).real + layer.D * x


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("length", [1, 33])
def test_outputs_and_gradients_are_those_of_the_published_layer(options, length, assert_close):
    layer, x = make(**options), torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]
    w = torch.randn(2, length, 3, dtype=torch.float64)
    y, oracle = layer(x), published(layer, x)
    assert_close(y.detach(), oracle.detach())
    inputs = [x, *layer.parameters()]
    found, expected = (torch.autograd.grad((out * w).sum(), inputs) for out in (y, oracle))
    for name, actual, right in zip(["x", *names], found, expected, strict=True):
        assert_close(actual, right, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype, assert_close):
    layer = make(dtype=dtype)
    x = torch.randn(2, 33, 3).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    wide = make()
    wide.load_state_dict(layer.state_dict())
    assert_close(y.detach(), wide(x.double()).detach())


def test_conversions_keep_both_parts_of_complex_parameters():
    layer = S5(3, 6)
    before = layer.Lambda.detach().clone()
    for convert, kind in (
        (lambda m: m.double(), torch.complex128),
        (lambda m: m.to(torch.float32), torch.complex64),
        (lambda m: m.bfloat16(), torch.complex64),
        (lambda m: m.to("cpu"), torch.complex64),
    ):
        layer = convert(layer)
        assert layer.Lambda.dtype == layer.C.dtype == kind
        assert isinstance(layer.Lambda, torch.nn.Parameter)
        torch.testing.assert_close(layer.Lambda.detach().to(before.dtype), before)
    assert layer.B.dtype == torch.bfloat16


@pytest.mark.parametrize("options", VARIANTS[:2])
def test_streaming_equals_the_sequence(options, assert_close):
    layer, x = make(**options), torch.randn(2, 11, 3, dtype=torch.float64)
    y, last = layer(x, return_last_state=True)
    state, steps = layer.initial_state(2), []
    for t in range(11):
        out, state = layer.step(x[:, t], state)
        steps.append(out)
    assert_close(torch.stack(steps, 1).detach(), y.detach())
    assert_close(state.detach(), last.detach())
    assert_close(layer(torch.cat([x, x], 1))[:, 11:].detach(), layer(x, initial_state=last).detach())


def test_hippo():
    """The eigenvalues and vectors of HiPPO-LegS plus its rank-one term."""
    n = torch.arange(7, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    A = -torch.tril(root[:, None] * root) + torch.diag(n)
    p = (n + 0.5).sqrt()
    eigenvalues, V = hippo_normal(7)
    torch.testing.assert_close(V @ torch.diag(eigenvalues) @ V.mH, (A + p[:, None] * p).to(V.dtype))


def test_initialisation():
    layer = S5(40, 64, block_count=4)
    eigenvalues, _ = hippo_normal(16)
    torch.testing.assert_close(layer.Lambda.detach(), eigenvalues.repeat(4).to(torch.complex64))
    half = S5(40, 64, block_count=4, conj_sym=True)
    both = torch.cat([half.Lambda.detach(), half.Lambda.detach().conj()])
    expected = hippo_normal(32)[0].repeat(4).to(torch.complex64)
    order = [value.imag.argsort(stable=True) for value in (both, expected)]
    torch.testing.assert_close(both[order[0]], expected[order[1]])
    assert layer.log_step.min() >= math.log(0.001)
    assert layer.log_step.max() <= math.log(0.1)
    assert layer.log_step.std() > 0.5
    for wide in (layer, half):  # V is unitary
        real = wide.B.norm() / math.sqrt(64 * 40)
        assert real.item() == pytest.approx(0.7737 / math.sqrt(64 * (2 if wide is half else 1)), rel=0.05)


def test_names_and_shapes():
    shapes = {name: tuple(p.shape) for name, p in make(bidir=True).named_parameters()}
    assert shapes == {"Lambda": (6,), "B": (6, 3, 2), "C": (3, 12), "D": (3,), "log_step": (6,)}


@pytest.mark.parametrize("kind", DISCRETIZATIONS)
def test_discretizations_are_inverted_and_exact_near_the_circle(kind):
    Lambda = torch.tensor([-0.5 + 3j, -1e-9 + 40j, -30 - 2j, -0.2 + 0j], dtype=torch.complex128)
    step = torch.full((4,), 0.05, dtype=torch.float64)
    log_lam, _ = DISCRETIZATIONS[kind](Lambda, step)
    torch.testing.assert_close(continuous(log_lam, step, kind), Lambda, rtol=1e-12, atol=1e-15)
    assert float(log_lam[1].real) < -1e-13


def test_an_integrator_has_a_zero_order_hold():
    step = torch.full((1,), 0.05, dtype=torch.float64)
    log_lam, gain = zoh(torch.zeros(1, dtype=torch.complex128), step)
    assert log_lam == 0
    assert gain == step


@pytest.mark.slow
def test_compiles_into_one_graph():
    layer, x = S5(4, 6, bidir=True), torch.randn(2, 48, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert layer.Lambda.grad.isfinite().all()


def test_reports_the_kernel_plan():
    layer = S5(4, 6)
    assert layer.kernel_plan is None
    layer(torch.zeros(50, 784, 4))
    assert layer.kernel_plan.op == "lti_scan"


@pytest.mark.parametrize(
    "arguments",
    [{"d_model": 0}, {"d_state": 0}, {"block_count": 4}, {"discretization": "euler"}, {"dt_min": 0.2}, {"step_scale": 0.0}],
)
def test_wrong_constructor_arguments(arguments):
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        S5(**{"d_model": 4, "d_state": 6, **arguments})


def test_wrong_calls():
    layer = S5(4, 6, bidir=True)
    with pytest.raises(ArgumentError, match="x:"):
        layer(torch.zeros(5, 4))
    for call in (
        lambda: layer(torch.zeros(1, 5, 4), layer.initial_state(1)),
        lambda: layer(torch.zeros(1, 5, 4), return_last_state=True),
        lambda: layer.step(torch.zeros(1, 4), layer.initial_state(1)),
    ):
        with pytest.raises(ArgumentError, match="bidirectional"):
            call()
    with pytest.raises(ArgumentError, match="state:"):
        S5(4, 6).step(torch.zeros(1, 4), torch.zeros(1, 5, dtype=torch.cfloat))
