"""torch.compile and reductions: what recompiles, and that the compiled model computes with the new parameters."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
from torch import nn

import compressm
from compressm.layers import LRU, Mamba

LAYERS = {"LRU": lambda: LRU(4, 8), "Mamba": lambda: Mamba(4, 8)}


class Stack(nn.Module):
    """Residual layers of one kind."""

    def __init__(self, kind: str, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LAYERS[kind]() for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture
def counted():
    """A compiler that counts the graphs it is given."""
    torch._dynamo.reset()
    yield torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def train_step(run: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    run(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def reduce_to(model: nn.Module, optimizer: torch.optim.Optimizer, ranks: list[int]) -> None:
    policy = compressm.FixedRank({f"layers.{i}": rank for i, rank in enumerate(ranks)})
    compressm.compress(model, policy, optimizer=optimizer)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_compiled_model_recompiles_once_per_reduction(kind, counted):
    torch.manual_seed(0)
    model = Stack(kind)
    optimizer = torch.optim.AdamW(model.parameters())
    compiled = torch.compile(model, backend=counted, fullgraph=True)
    x = torch.randn(2, 9, 4)
    for expected, ranks in enumerate(([8, 8, 8], [5, 8, 8], [4, 3, 6]), start=1):
        reduce_to(model, optimizer, ranks)
        for _ in range(2):
            train_step(compiled, model, optimizer, x)
        assert counted.frame_count == expected
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
        counted.frame_count = expected  # the comparison without gradients is a graph of its own


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own look at the layers' inputs
@pytest.mark.parametrize("kind", LAYERS)
def test_compiled_layers_recompile_once_each_and_only_if_reduced(kind, counted):
    torch.manual_seed(0)
    model = Stack(kind)
    optimizer = torch.optim.AdamW(model.parameters())
    for layer in model.layers:
        layer.compile(backend=counted, fullgraph=True)
    x = torch.randn(2, 9, 4, requires_grad=True)  # or the first layer, whose input needs no gradient, is a graph of its own
    train_step(model, model, optimizer, x)
    assert counted.frame_count == 1  # layers of equal shapes share their graph
    for ranks, recompiled in (([5, 8, 8], 1), ([5, 4, 8], 1), ([3, 2, 7], 3), ([3, 2, 7], 0)):
        before = counted.frame_count
        reduce_to(model, optimizer, ranks)
        for _ in range(2):
            train_step(model, model, optimizer, x)
        assert counted.frame_count - before == recompiled
