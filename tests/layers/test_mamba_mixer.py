"""The mixer of Mamba-1 as one C++ op: the numbers of its separate steps, and that what needs those gets them."""

from __future__ import annotations

import copy

import pytest
import torch
from global_state import threads
from layers.single_gradients import check_single_gradients
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from compressm.errors import ArgumentError
from compressm.kernels.fused_cpu.mamba_mixer import pieces_of
from compressm.layers import Mamba

OPTIONS = [{}, {"bias": True}, {"conv_bias": False, "d_conv": 2}, {"dt_rank": 3}]


@pytest.fixture(autouse=True)
def _two_threads():
    """As many as there are pieces in the batches here, at most."""
    with threads(2):
        yield


def mixer_of(channels: int = 6, states: int = 5, **options) -> Mamba:
    torch.manual_seed(0)
    return Mamba(channels, d_state=states, **options)


def tokens(batch: int = 5, length: int = 300, channels: int = 6) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, length, channels)


def one_op(out: Tensor) -> bool:
    """Whether nothing lies between it and the layer's input and parameters."""
    before = [node for node, _ in out.grad_fn.next_functions if node is not None]
    return "Differentiable" in out.grad_fn.name() and {node.name() for node in before} == {"torch::autograd::AccumulateGrad"}


def run_separately(mixer: Mamba) -> Mamba:
    """A hook that does nothing needs the module that it hangs on."""
    mixer.x_proj.register_forward_hook(lambda *_: None)
    return mixer


def evaluate(mixer: Mamba, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients by name."""
    x = x.detach().requires_grad_()
    y = mixer(x)
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    leaves = {"x": x, **dict(mixer.named_parameters())}
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad((y * weight).sum(), list(leaves.values())), strict=True))}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(5, 300, 6, 5), (2, 600, 3, 1), (3, 513, 16, 17)])  # batch, L, d_model, N
@pytest.mark.usefixtures("poisoned_memory")
def test_values_and_gradients_are_those_of_float64(assert_close, shape, options):
    batch, length, channels, states = shape
    mixer, x = mixer_of(channels, states, **options), tokens(batch, length, channels)
    assert one_op(mixer(x))
    results = evaluate(mixer, x)
    for name, expected in evaluate(copy.deepcopy(mixer).double(), x.double()).items():
        assert results[name].dtype == torch.float32
        assert_close(results[name].double(), expected, name, torch.float32)


def test_the_same_bits_for_any_number_of_threads():
    mixer, x = mixer_of(), tokens()
    both = evaluate(mixer, x)
    with threads(1):
        assert one_op(mixer(x))
        for name, value in evaluate(mixer, x).items():
            assert torch.equal(both[name], value), name


def test_each_gradient_on_its_own():
    mixer, x = mixer_of(bias=True), tokens()
    check_single_gradients(mixer, x, evaluate(mixer, x), one_op)


@pytest.mark.parametrize("frozen", ["in_proj", "x_proj", "dt_proj", "out_proj"])
def test_frozen_projections_get_no_gradient(frozen):
    mixer, x = mixer_of(), tokens()
    expected = evaluate(mixer, x)
    getattr(mixer, frozen).requires_grad_(False)
    y = mixer(x)
    assert one_op(y)
    (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    for name, parameter in mixer.named_parameters():
        if name.startswith(frozen):
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, expected[name]), name


def test_under_no_grad():
    mixer, x = mixer_of(), tokens()
    with torch.no_grad():
        y = mixer(x)
    assert torch.equal(y, mixer(x))
    assert not y.requires_grad


def test_without_the_fast_path(assert_close):
    mixer, x = mixer_of(use_fast_path=False), tokens()
    y = mixer(x)
    assert not one_op(y)
    mixer.use_fast_path = True
    assert one_op(mixer(x))
    assert_close(mixer(x), y, "y", torch.float32)


def test_any_strides(assert_close):
    mixer, x = mixer_of(), tokens(channels=12)[..., ::2]
    assert one_op(mixer(x))
    assert_close(mixer(x), run_separately(mixer)(x), "y", torch.float32)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    mixer, x = mixer_of(), tokens()
    expected, x = evaluate(mixer, x), x.requires_grad_()
    y = checkpoint(mixer, x, use_reentrant=reentrant)
    (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    for name, value in {"x": x.grad, **{name: p.grad for name, p in mixer.named_parameters()}}.items():
        assert torch.equal(value, expected[name]), name


def test_derivatives_that_it_does_not_have():
    mixer, x = mixer_of(), tokens().requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()
    _, tangent = torch.func.jvp(mixer, (x.detach(),), (torch.ones_like(x),))
    assert tangent.norm() > 0


def test_another_backend_that_is_asked_for_runs(monkeypatch, assert_close):
    mixer, x = mixer_of(), tokens()
    expected = mixer(x)
    monkeypatch.setenv("COMPRESSM_BACKEND", "reference")
    y = mixer(x)
    assert not one_op(y)
    assert_close(y, expected, "y", torch.float32)


def test_autocast_and_other_dtypes_run_the_separate_steps():
    mixer, x = mixer_of(), tokens()
    expected = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    assert not one_op(y)
    torch.testing.assert_close(y.float(), expected, rtol=5e-2, atol=5e-2)
    assert not one_op(copy.deepcopy(mixer).bfloat16()(x.bfloat16()))


def test_decay_that_is_not_finite_is_named():
    mixer = mixer_of()
    with torch.no_grad():
        mixer.A_log[1, 2] = 200.0
    with pytest.raises(ArgumentError, match=r"^A_log: expected numbers with a finite exponential"):
        mixer(tokens())


def test_pieces():
    small = 1000  # parameters
    assert pieces_of(16, 256, 128, small, 2) == 8  # of two sequences
    assert pieces_of(4, 2048, 128, small, 4) == 4  # a sequence is never cut
    assert pieces_of(4, 2048, 128, small, 8) == 0  # threads that would have nothing to do
    assert pieces_of(16, 256, 128, 100 * small, 2) == 0  # partial gradients that cost more than they save
    assert pieces_of(0, 256, 128, small, 1) == pieces_of(16, 0, 128, small, 1) == 0
