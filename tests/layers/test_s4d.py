"""The S4D layer: the published convolution, the recurrence, streaming, initialisation."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from compressm.errors import ArgumentError
from compressm.layers import S4D
from compressm.layers._fft_convolution import convolve
from compressm.layers._vandermonde import last_state, response
from compressm.layers.s4d import MODES


def make(d_model=3, d_state=10, **options) -> S4D:
    return S4D(d_model, d_state, **{"dtype": torch.float64, **options})


def published(layer: S4D, u: torch.Tensor) -> torch.Tensor:
    """The standalone S4D's forward pass, with the kernel as one sum over all powers."""
    kernel, length = layer.kernel, u.shape[-1]
    A = -torch.exp(kernel.log_A_real) + 1j * kernel.A_imag
    dtA = A * torch.exp(kernel.log_dt)[:, None]
    C = torch.view_as_complex(kernel.C) * (torch.exp(dtA) - 1) / A
    K = 2 * torch.einsum("hn,hnl->hl", C, torch.exp(dtA[..., None] * torch.arange(length))).real
    y = torch.einsum("hts,bhs->bht", toeplitz_of(K), u) + u * layer.D[:, None]
    return layer.output_linear(F.gelu(y))


@pytest.mark.parametrize("mode", ["convolution", "recurrent"])
@pytest.mark.parametrize("length", [1, 33, 100])
def test_outputs_and_gradients_are_those_of_the_published_layer(mode, length, assert_close):
    layer, u = make(mode=mode), torch.randn(2, 3, length, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 3, length, dtype=torch.float64)
    y, oracle = layer(u), published(layer, u)
    assert_close(y.detach(), oracle.detach())
    inputs = [u, *layer.parameters()]
    found, expected = (torch.autograd.grad((out * w).sum(), inputs) for out in (y, oracle))
    for name, actual, right in zip(["u", *dict(layer.named_parameters())], found, expected, strict=True):
        assert_close(actual, right, name)


@pytest.mark.parametrize("length", [1, 7, 12])
def test_the_convolution_has_all_derivatives(length, assert_close):
    u, kernel = torch.randn(2, 3, length, dtype=torch.float64), torch.randn(3, length, dtype=torch.float64)
    assert_close(convolve(u, kernel), torch.einsum("hts,bhs->bht", toeplitz_of(kernel), u))
    both = [u.requires_grad_(), kernel.requires_grad_()]
    assert torch.autograd.gradcheck(convolve, both)
    assert torch.autograd.gradgradcheck(convolve, both)
    tangents = torch.randn(5, 2, 3, length, dtype=torch.float64)
    expected = torch.stack([torch.func.jvp(lambda x: convolve(x, kernel), (u,), (t,))[1] for t in tangents])
    assert_close(expected.detach(), torch.func.vmap(lambda t: convolve(t, kernel))(tangents).detach())
    for frozen in (u, kernel):
        frozen.requires_grad_(False)
        (free,) = [t for t in both if t.requires_grad]
        (found,) = torch.autograd.grad(convolve(u, kernel).square().sum(), free)
        (oracle,) = torch.autograd.grad(torch.einsum("hts,bhs->bht", toeplitz_of(kernel), u).square().sum(), free)
        assert_close(found, oracle)
        frozen.requires_grad_(True)


def toeplitz_of(kernel: torch.Tensor) -> torch.Tensor:
    """(H, L, L) lower triangular matrices of kernels (H, L)."""
    lags = torch.arange(kernel.shape[-1])[:, None] - torch.arange(kernel.shape[-1])
    return torch.where(lags >= 0, kernel[:, lags.clamp(min=0)], 0.0)


@pytest.mark.parametrize("mode", MODES)
def test_streaming_equals_the_sequence(mode, assert_close):
    layer, u = make(mode=mode), torch.randn(2, 3, 23, dtype=torch.float64)
    y, last = layer(u, return_last_state=True)
    state, steps = layer.initial_state(2), []
    for t in range(23):
        out, state = layer.step(u[..., t], state)
        steps.append(out)
    assert_close(torch.stack(steps, -1).detach(), y.detach())
    assert_close(state.detach(), last.detach())
    first, state = layer(u[..., :9], return_last_state=True)
    rest, state = layer(u[..., 9:], state, return_last_state=True)
    assert_close(torch.cat([first, rest], -1).detach(), y.detach())
    assert_close(state.detach(), last.detach())


@pytest.mark.parametrize("length", [1, 2, 33, 257])
def test_sums_of_powers(length, assert_close):
    log_lam = torch.complex(-torch.rand(2, 5, dtype=torch.float64), 6 * torch.rand(2, 5, dtype=torch.float64))
    gain, u = torch.randn(4, 2, 5, dtype=torch.complex128), torch.randn(4, 2, length, dtype=torch.float64)
    powers = torch.exp(log_lam[..., None] * torch.arange(length))
    assert_close(response(gain, log_lam, length), torch.einsum("bhn,hnl->bhl", gain, powers).real)
    assert_close(last_state(u, log_lam), torch.einsum("bhl,hnl->bhn", u.to(powers.dtype), powers.flip(-1)))


def test_layout_and_dtypes(assert_close):
    layer, u = make(), torch.randn(2, 3, 20, dtype=torch.float64)
    rows = make(transposed=False)
    rows.load_state_dict(layer.state_dict())
    assert_close(rows(u.mT).detach(), layer(u).mT.detach())
    for dtype in (torch.float32, torch.bfloat16):
        narrow = make(dtype=dtype)
        wide = make()
        wide.load_state_dict(narrow.state_dict())
        y = narrow(u.to(dtype))
        assert y.dtype == dtype
        assert_close(y.detach(), wide(u.to(dtype).double()).detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = make(dtype=torch.float32)(u.float())
    assert torch.isfinite(mixed).all()


def test_names_and_shapes():
    shapes = {name: tuple(p.shape) for name, p in make(3, 10).state_dict().items()}
    assert shapes == {
        "D": (3,), "kernel.C": (3, 5, 2), "kernel.log_dt": (3,), "kernel.log_A_real": (3, 5), "kernel.A_imag": (3, 5),
        "output_linear.0.weight": (6, 3, 1), "output_linear.0.bias": (6,),
    }  # fmt: skip
    layer = make(lr=1e-3)
    assert layer.kernel.A_imag._optim == {"weight_decay": 0.0, "lr": 1e-3}
    assert not hasattr(layer.kernel.C, "_optim")


def test_initialisation():
    n = torch.arange(5, dtype=torch.float64)
    for init, real, imag in (
        ("lin", 0.5 + 0 * n, math.pi * n),
        ("inv", 0.5 + 0 * n, 10 / math.pi * (10 / (2 * n + 1) - 1)),
        ("real", n + 1, 0 * n),
    ):
        kernel = make(init=init).kernel
        torch.testing.assert_close(kernel.log_A_real.detach().exp(), real.expand(3, 5))
        torch.testing.assert_close(kernel.A_imag.detach(), imag.expand(3, 5))
    many = make(500, 20, dt_min=0.01, dt_max=0.02)
    assert torch.view_as_complex(many.kernel.C.detach()).abs().square().mean().item() == pytest.approx(1, rel=0.05)
    assert many.kernel.log_dt.exp().min() >= 0.01 - 1e-9
    assert many.kernel.log_dt.exp().max() <= 0.02 + 1e-9


def test_the_plan_follows_the_number_of_states():
    layer = S4D(4, 64)
    assert layer.kernel_plan is None
    layer(torch.zeros(2, 4, 100))
    assert layer.kernel_plan.form == "convolution"
    for name in ("C", "log_A_real", "A_imag"):
        setattr(layer.kernel, name, torch.nn.Parameter(layer.kernel.get_parameter(name)[:, :2].detach()))
    assert layer.kernel_plan.form == "recurrent"
    assert layer(torch.zeros(2, 4, 100)).shape == (2, 4, 100)
    layer.mode = "convolution"
    assert layer.kernel_plan.form == "convolution"


@pytest.mark.slow
def test_compiles_into_one_graph():
    layer, u = S4D(4, 6, mode="convolution"), torch.randn(2, 4, 48)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(u), layer(u))
    compiled(u).sum().backward()
    assert layer.kernel.A_imag.grad.isfinite().all()


@pytest.mark.parametrize(
    "arguments",
    [{"d_model": 0}, {"d_state": 3}, {"dropout": 2.0}, {"mode": "fft"}, {"init": "legs"}, {"dt_min": 0.2}],
)
def test_wrong_constructor_arguments(arguments):
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        S4D(**{"d_model": 4, "d_state": 6, **arguments})


def test_wrong_calls():
    layer = S4D(4, 6)
    with pytest.raises(ArgumentError, match=r"u: expected \(batch, 4, length\)"):
        layer(torch.zeros(2, 5, 3))
    with pytest.raises(ArgumentError, match=r"state:.*begin anew"):
        layer(torch.zeros(2, 4, 3), torch.zeros(2, 4, 5, dtype=torch.cfloat))
    with pytest.raises(ArgumentError, match="u:"):
        layer.step(torch.zeros(2, 5), layer.initial_state(2))
