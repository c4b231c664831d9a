"""The LRU's residual block: its definition, as one C++ op bit by bit, and that what needs the separate steps gets them."""

from __future__ import annotations

import pytest
import torch
from layers.single_gradients import check_single_gradients
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

from compressm.errors import ArgumentError
from compressm.layers import LRU, LRUBlock

SHAPES = [(1, 1, 2, 1), (2, 11, 6, 5), (3, 40, 8, 3), (2, 65, 9, 4), (1, 301, 3, 50)]  # batch, L, H, N


def block_of(channels: int = 6, states: int = 5, dropout: float = 0.0) -> LRUBlock:
    torch.manual_seed(0)
    block = LRUBlock(channels, states, dropout=dropout)
    with torch.no_grad():
        for parameter in block.norm.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return block


def one_op(out: Tensor) -> bool:
    """Whether nothing lies between it and the block's input and parameters."""
    before = [node for node, _ in out.grad_fn.next_functions if node is not None]
    return "Differentiable" in out.grad_fn.name() and {node.name() for node in before} == {"torch::autograd::AccumulateGrad"}


def run_separately(block: LRUBlock) -> None:
    """A hook that does nothing needs the module that it hangs on."""
    block.lru.register_forward_hook(lambda *_: None)


def evaluate(run, block: LRUBlock, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients by name; the same random numbers for every call."""
    x = x.detach().requires_grad_()
    torch.manual_seed(3)
    y = run(x)
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    leaves = {"x": x, **dict(block.named_parameters())}
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad((y * weight).sum(), list(leaves.values())), strict=True))}


def assert_same_bits_separately(block: LRUBlock, x: Tensor) -> None:
    ours = evaluate(block, block, x)
    run_separately(block)
    for name, value in evaluate(block, block, x).items():
        assert torch.equal(ours[name], value), name


def definition(block: LRUBlock, x: Tensor) -> Tensor:
    left, right = block.glu(nn.functional.gelu(block.lru(block.norm(x)))).chunk(2, -1)
    return x + left * torch.sigmoid(right)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("poisoned_memory")
def test_values_and_gradients_are_those_of_float64(assert_close, shape):
    *rows, channels, states = shape
    block, x = block_of(channels, states), torch.randn(*rows, channels)
    assert one_op(block(x))
    results = evaluate(block, block, x)
    block.double()
    for name, expected in evaluate(lambda x: definition(block, x), block, x.double()).items():
        assert results[name].dtype == torch.float32
        assert_close(results[name].double(), expected, name, torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_the_same_bits_as_the_separate_steps(shape, training):
    *rows, channels, states = shape
    block, x = block_of(channels, states, 0.4).train(training), torch.randn(*rows, channels)
    assert_same_bits_separately(block, x)


def test_without_biases():
    block, x = block_of(), torch.randn(2, 11, 6)
    block.norm.bias = block.glu.bias = None
    assert one_op(block(x))
    assert_same_bits_separately(block, x)


def test_under_no_grad():
    block, x = block_of(), torch.randn(2, 40, 6)
    with torch.no_grad():
        y = block(x)
    assert torch.equal(y, block(x))
    assert not y.requires_grad


@pytest.mark.parametrize("channels", [6, 9])  # a narrow and a wide gate
def test_each_gradient_on_its_own(channels):
    block, x = block_of(channels), torch.randn(2, 40, channels)
    check_single_gradients(block, x, evaluate(block, block, x), one_op)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_it_with_the_same_masks(reentrant):
    block, x = block_of(dropout=0.4), torch.randn(2, 40, 6)
    plain, x = evaluate(block, block, x), x.requires_grad_()
    torch.manual_seed(3)
    y = checkpoint(block, x, use_reentrant=reentrant)
    (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    again = {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in block.named_parameters()}}
    for name, value in plain.items():
        assert torch.equal(again[name], value), name


def test_hooks_run_wherever_they_are():
    block, x = block_of(), torch.randn(2, 9, 6, requires_grad=True)
    expected, calls = block(x), []
    for name in ("norm", "lru"):  # the separate steps read the weight of glu as well
        module = getattr(block, name)
        for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
            handle = getattr(module, register)(lambda *_: calls.append(1))
            y = block(x)
            y.sum().backward()
            assert not one_op(y)
            assert calls == [1]
            torch.testing.assert_close(y, expected)
            handle.remove()
            calls.clear()
    handle = register_module_forward_hook(lambda module, *_: calls.append(type(module)))
    block(x)
    handle.remove()
    assert LRU in calls
    assert one_op(block(x))


class Half(LRU):
    """As a library would replace the layer."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


def test_another_layer_is_called():
    block, x = block_of(), torch.randn(2, 9, 6)
    before = block(x)
    block.lru.__class__ = Half
    y = block(x)
    assert not one_op(y)
    assert (y - before).norm() > 1e-3 * before.norm()


def test_another_backend_that_is_asked_for_runs(monkeypatch):
    block, x = block_of(), torch.randn(2, 9, 6)
    expected = block(x)
    monkeypatch.setenv("COMPRESSM_BACKEND", "reference")
    y = block(x)
    assert not one_op(y)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("channels", [6, 9])
def test_autocast_runs_the_separate_steps(channels):
    block, x = block_of(channels), torch.randn(2, 9, channels)
    expected = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert not one_op(y)
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)


def test_vmap_sees_the_separate_steps():
    block, x = block_of(), torch.randn(3, 2, 9, 6)
    torch.testing.assert_close(torch.func.vmap(block)(x), torch.stack([block(part) for part in x]))


@pytest.mark.slow
def test_compiles_into_one_graph():
    block, x = block_of(), torch.randn(2, 9, 6)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


def test_other_dtypes_run():
    block, x = block_of().double(), torch.randn(2, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(block(x), definition(block, x))
    assert block_of().bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_without_elements(shape):
    assert block_of()(torch.randn(*shape, 6)).shape == (*shape, 6)


def test_the_layer_knows_its_kernel():
    block, x = block_of(), torch.randn(2, 300, 6)
    assert block.lru.kernel_plan is None
    assert one_op(block(x))
    alone = LRU(6, 5)
    alone(x)
    assert block.lru.kernel_plan == alone.kernel_plan


def test_wrong_arguments_are_named():
    for arguments, name in (((0, 3), "d_model"), ((3, 0), "d_state")):
        with pytest.raises(ArgumentError, match=f"^{name}:"):
            LRUBlock(*arguments)
    with pytest.raises(ArgumentError, match=r"^dropout:"):
        LRUBlock(2, 3, dropout=1.5)
    for shape in ((2, 6), (2, 9, 5), (2, 3, 9, 6)):
        with pytest.raises(ArgumentError):
            block_of()(torch.randn(shape))
    with pytest.raises(ArgumentError, match="device"):
        block_of().to("meta")(torch.randn(2, 9, 6))
