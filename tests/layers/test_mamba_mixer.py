"""The Mamba layer as one C++ op: its gradients, and that everything which needs the separate steps gets them."""

from __future__ import annotations

import pytest
import torch
from layers.single_gradients import check_single_gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from compressm.errors import ArgumentError
from compressm.layers import Mamba

OPTIONS = [
    {},
    {"conv_bias": False, "bias": True},
    {"expand": 1.5, "d_conv": 2, "dt_rank": 3},
    {"d_conv": 1, "d_state": 1},
    {"d_model": 33, "d_state": 19, "dt_rank": 1},
]


def layer_of(options: dict) -> Mamba:
    """A float32 layer whose states move."""
    torch.manual_seed(0)
    layer = Mamba(**{"d_model": 6, "d_state": 5, **options})
    with torch.no_grad():
        layer.dt_proj.bias.add_(2.0)
        layer.D.normal_()
    return layer


def one_op(out: Tensor) -> bool:
    return "MambaMixerOp" in out.grad_fn.name()


def run_separately(layer: Mamba) -> None:
    """A hook that does nothing needs the step that it hangs on."""
    layer.x_proj.register_forward_hook(lambda *_: None)


def evaluate(layer: Mamba, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients by name."""
    x = x.detach().requires_grad_()
    y = layer(x)
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    leaves = {"x": x, **dict(layer.named_parameters())}
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad((y * weight).sum(), list(leaves.values())), strict=True))}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 11), (3, 70), (20, 33)])
@pytest.mark.usefixtures("poisoned_memory")
def test_values_and_gradients_are_those_of_float64(assert_close, options, shape):
    layer = layer_of(options)
    x = torch.randn(*shape, layer.d_model)
    assert one_op(layer(x))
    results = evaluate(layer, x)
    for name, expected in evaluate(layer.double(), x.double()).items():
        assert results[name].dtype == torch.float32
        assert results[name].is_contiguous()
        assert_close(results[name].double(), expected, name, torch.float32)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.usefixtures("poisoned_memory")
def test_bfloat16_is_as_exact_as_the_separate_steps(options, autocast):
    layer = layer_of(options)
    x = torch.randn(4, 70, layer.d_model).bfloat16()
    if not autocast:
        for part in (layer.in_proj, layer.conv1d, layer.x_proj, layer.dt_proj, layer.out_proj):
            part.bfloat16()
    exact = evaluate(layer_of(options).double(), x.double())

    def run() -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert one_op(layer(x)) != separate
            return evaluate(layer, x.float() if autocast else x)

    separate = False
    ours = run()
    run_separately(layer)
    separate = True
    for name, plain in run().items():
        assert ours[name].dtype == plain.dtype
        errors = [(t.double() - exact[name]).norm() / exact[name].norm() for t in (ours[name], plain)]
        assert errors[0] < 1.3 * errors[1] + 2e-3, name


def test_under_no_grad():
    layer, x = layer_of({}), torch.randn(2, 40, 6)
    with torch.no_grad():
        y = layer(x)
    assert torch.equal(y, layer(x))
    assert not y.requires_grad


def test_each_gradient_on_its_own():
    layer, x = layer_of({"bias": True}), torch.randn(2, 40, 6)
    check_single_gradients(layer, x, evaluate(layer, x), one_op)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    layer, x = layer_of({}), torch.randn(2, 40, 6, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, expected)


def test_second_derivatives_are_refused():
    layer, x = layer_of({}), torch.randn(2, 9, 6, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="mamba_mixer_backward"):
        first.sum().backward()


def test_arguments_changed_in_place_are_found():
    layer, x = layer_of({}), torch.randn(2, 9, 6)
    y = layer(x)
    with torch.no_grad():
        layer.x_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Adapter(nn.Linear):
    """As an adapter library replaces a projection: its weight alone is not what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", ["x_proj", "out_proj"])
def test_an_adapter_around_a_projection_is_called(name):
    layer, x = layer_of({}), torch.randn(2, 9, 6)
    before = layer(x)
    getattr(layer, name).__class__ = Adapter
    y = layer(x)
    assert not one_op(y)
    assert (y - before).norm() > 1e-3 * before.norm()
    run_separately(layer)
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("name", ["x_proj", "out_proj"])
def test_hooks_on_a_projection_run(name):
    layer, x = layer_of({}), torch.randn(2, 9, 6)
    expected, calls = layer(x), []
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        handle = getattr(getattr(layer, name), register)(lambda *_: calls.append(1))
        y = layer(x)
        y.sum().backward()
        assert calls == [1]
        torch.testing.assert_close(y, expected)
        handle.remove()
        calls.clear()
    assert one_op(layer(x))


def test_another_backend_that_is_asked_for_runs(monkeypatch):
    layer, x = layer_of({}), torch.randn(2, 9, 6)
    expected = layer(x)
    monkeypatch.setenv("COMPRESSM_BACKEND", "reference")
    y = layer(x)
    assert not one_op(y)
    torch.testing.assert_close(y, expected)


def test_vmap_sees_the_separate_steps():
    layer, x = layer_of({}), torch.randn(3, 2, 9, 6)
    torch.testing.assert_close(torch.func.vmap(layer)(x), torch.stack([layer(part) for part in x]))


def test_flop_counters_see_the_products():
    layer, x = layer_of({}), torch.randn(2, 9, 6)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    weights = (layer.in_proj, layer.x_proj, layer.dt_proj, layer.out_proj)
    convolution = 2 * 2 * (9 + layer.d_conv - 1) * layer.conv1d.weight.numel()  # torch's, which pads both ends
    assert counter.get_total_flops() == sum(2 * 18 * m.weight.numel() for m in weights) + convolution


def test_mixed_dtypes_are_refused_as_torch_does():
    with pytest.raises(RuntimeError, match="dtype"):
        layer_of({})(torch.randn(2, 9, 6).bfloat16())


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_without_elements(shape):
    assert layer_of({})(torch.randn(*shape, 6)).shape == (*shape, 6)


@pytest.mark.parametrize("value", [float("nan"), 100.0])
def test_a_decay_that_is_not_finite_is_named(value):
    layer = layer_of({})
    with torch.no_grad():
        layer.A_log[1, 2] = value
    with pytest.raises(ArgumentError, match=r"^A_log:"):
        layer(torch.randn(2, 9, 6))
