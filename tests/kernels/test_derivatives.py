"""Derivatives of every kind are right, or refused with the way out."""

from __future__ import annotations

import copy

import pytest
import torch
from kernels.test_every_shape import MODULES
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

from compressm.errors import BackendError
from compressm.kernels import fused_cpu
from compressm.layers import LRU, LayerNorm, LRUBlock, Mamba, RMSNorm

LAYERS = {"LRU": (LRU, 4), "Mamba": (Mamba, 4), "LRUBlock": (LRUBlock, 4), "LayerNorm": (LayerNorm,), "RMSNorm": (RMSNorm,)}


@pytest.fixture(params=MODULES)
def module(request):
    torch.manual_seed(0)
    return MODULES[request.param]()


NO_KERNELS = ("float64", "reference", "constant", "standardized_linear")  # or none whose input has a gradient


@pytest.fixture(params=[name for name in MODULES if not any(word in name for word in NO_KERNELS)])
def compiled(request):
    """A module that runs compiled kernels."""
    torch.manual_seed(0)
    return MODULES[request.param]()


@pytest.fixture(params=LAYERS)
def layer(request):
    kind, *states = LAYERS[request.param]
    return kind(8, *states)


def draw(module: nn.Module, batch: int = 2) -> Tensor:
    dtype = next(module.parameters(), torch.empty(0)).dtype
    return torch.randn(batch, 9, module.d_model if isinstance(module, LRU) else 8, dtype=dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-4)


def tangent(module: nn.Module, x: Tensor, direction: Tensor) -> Tensor:
    """J v by two reverse passes: the derivative by w of (w^T J) v."""
    module = copy.deepcopy(module).double().requires_grad_(False)
    x, direction = x.double(), direction.double()
    with torch.no_grad():
        return (module(x + 1e-6 * direction) - module(x - 1e-6 * direction)) / 2e-6


def test_forward_mode_of_torch_func(module):
    x, direction = draw(module), draw(module)
    _, result = jvp(module, (x,), (direction,))
    close(result, tangent(module, x, direction))


@pytest.mark.parametrize("frozen", [False, True])
def test_dual_numbers(layer, frozen):
    layer.requires_grad_(not frozen)
    x, direction = draw(layer), draw(layer)
    with forward_ad.dual_level():
        result = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction))).tangent
    close(result, tangent(layer, x, direction))


def test_dual_parameters(layer):
    name, value = next(iter(layer.named_parameters()))
    x, direction = draw(layer), torch.randn_like(value)

    def at(parameter: Tensor) -> Tensor:
        return functional_call(layer, {name: parameter}, (x,))

    _, result = jvp(at, (value.detach(),), (direction,))
    with torch.no_grad():
        close(result, (at(value + 1e-2 * direction) - at(value - 1e-2 * direction)) / 2e-2)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's own operations
def test_jacobians_agree(layer):
    x = draw(layer, 1)
    expected = torch.autograd.functional.jacobian(layer, x)
    close(jacrev(layer)(x), expected)
    close(jacfwd(layer)(x), expected)
    close(torch.autograd.functional.jacobian(layer, x, vectorize=True), expected)
    close(torch.autograd.functional.jacobian(layer, x, vectorize=True, strategy="forward-mode"), expected)


def test_gradients_per_sample(layer):
    weights = {name: p.detach() for name, p in layer.named_parameters()}
    x, target = draw(layer, 5), draw(layer, 5)

    def loss(weights, x, target):
        return (functional_call(layer, weights, (x[None],))[0] - target).square().mean()

    found = vmap(grad(loss), (None, 0, 0))(weights, x, target)
    for i in range(5):
        alone = torch.autograd.grad((layer(x[i : i + 1])[0] - target[i]).square().mean(), list(layer.parameters()))
        for actual, expected in zip(found.values(), alone, strict=True):
            close(actual[i], expected)


def test_an_ensemble_by_vmap(layer):
    layers = [copy.deepcopy(layer) for _ in range(3)]
    for other in layers:
        for parameter in other.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    stacked, _ = torch.func.stack_module_state(layers)
    x = draw(layer)
    found = vmap(lambda weights: functional_call(layer, weights, (x,)))({k: v.detach() for k, v in stacked.items()})
    for actual, other in zip(found, layers, strict=True):
        close(actual, other(x))


def test_a_second_derivative_is_refused_with_the_way_out(compiled):
    x = draw(compiled).requires_grad_()
    (first,) = torch.autograd.grad(compiled(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative.*COMPRESSM_BACKEND=reference"):
        torch.autograd.grad(first.square().sum(), x)


def test_the_way_out_of_a_second_derivative(layer, monkeypatch):
    monkeypatch.setenv("COMPRESSM_BACKEND", "reference")
    x, direction = draw(layer), draw(layer)

    def penalty(x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return first.square().sum()

    (second,) = torch.autograd.grad(penalty(x.requires_grad_()), x)
    wide, at = copy.deepcopy(layer).double(), x.detach().double()
    exact = [
        torch.autograd.grad(wide(moved).square().sum(), moved)[0].square().sum()
        for moved in ((at + sign * 1e-6 * direction.double()).requires_grad_() for sign in (1, -1))
    ]
    torch.testing.assert_close((second * direction).sum().double(), (exact[0] - exact[1]) / 2e-6, rtol=1e-3, atol=1e-3)


def test_the_gradient_itself_may_keep_its_graph(layer):
    x = draw(layer).requires_grad_()
    plain = torch.autograd.grad(layer(x).square().sum(), x)
    kept = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    close(kept[0], plain[0])


def test_a_compiled_backend_that_is_asked_for_says_why_it_cannot(monkeypatch):
    x = torch.randn(2, 3)
    with pytest.raises(BackendError, match="no derivatives in forward mode"):
        jvp(lambda x: fused_cpu.gelu_dropout(x, 0.0, backend="cpp"), (x,), (x,))
    refused = pytest.raises(NotImplementedError, match=r"no forward-mode derivative.*COMPRESSM_BACKEND=reference")
    with refused, forward_ad.dual_level():
        torch.ops.compressm_cpp.gelu_dropout(forward_ad.make_dual(x, x), None, 0.0)


class _NoGradient(torch.autograd.Function):
    """Passes its input on, and nothing back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_no_gradient_comes_in(module):
    x = draw(module).requires_grad_()
    _NoGradient.apply(module(x)).sum().backward()
    assert x.grad is None or not x.grad.any()


def test_one_of_two_gradients_comes_in():
    layer, x = LRU(8, 4), torch.randn(2, 9, 8, requires_grad=True)
    y, last = layer(x, return_last_state=True)
    expected = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (actual,) = torch.autograd.grad(y.sum() + _NoGradient.apply(last.real).sum(), x)
    close(actual, expected[0])


def test_what_an_op_returns_may_be_changed_in_place(module, request):
    if "diagonal_scan" in request.node.name:
        pytest.skip("its backward reads what it returned, as that of torch.exp does")
    x = draw(module).requires_grad_()
    (expected,) = torch.autograd.grad((module(x) * 2 + 2).sum(), x)
    y = module(x)
    y += 1
    y.mul_(2)
    (actual,) = torch.autograd.grad(y.sum(), x)
    close(actual, expected)


def test_a_view_of_what_an_op_returns_may_be_changed_in_place(layer):
    x = draw(layer).requires_grad_()
    y = layer(x)
    y[:, 0].zero_()
    (actual,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(layer(x)[:, 1:].sum(), x)
    close(actual, expected)
