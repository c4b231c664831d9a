"""A user's own model: an encoder, two LRU blocks and a head, float64 so that oracles are exact."""

from __future__ import annotations

import copy

import pytest
import torch
from compression.guard_cases import Whole
from torch import nn
from torch.optim.swa_utils import AveragedModel

from compressm.layers import LRU


class Net(nn.Module):
    """tokens (batch, L, 2) -> logits (batch, 3)."""

    def __init__(self, ranks: tuple[int, ...] = (8, 6), channels: int = 4, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, channels, dtype=dtype)
        self.lrus = nn.ModuleList(LRU(channels, rank, max_phase=1.5, dtype=dtype) for rank in ranks)
        self.norms = nn.ModuleList(nn.BatchNorm1d(channels, dtype=dtype) for _ in ranks)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(channels, 3, dtype=dtype)

    def forward(self, x):
        x = self.encoder(x)
        for lru, norm in zip(self.lrus, self.norms, strict=True):
            x = x + self.drop(torch.tanh(lru(norm(x.mT).mT)))
        return self.head(x.mean(1))


class Training:
    """A model with its optimizer and a reproducible stream of batches."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 1) -> None:
        self.model, self.optimizer = model, optimizer
        self.random = torch.Generator().manual_seed(seed)

    def batch(self, count: int = 5, length: int = 9):
        x = torch.randn(count, length, 2, generator=self.random, dtype=torch.float64)
        return x.to(next(self.model.parameters()).dtype), torch.randint(3, (count,), generator=self.random)

    def step(self, steps: int = 1) -> None:
        for _ in range(steps):
            x, y = self.batch()
            loss = nn.functional.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


@pytest.fixture
def make_net():
    return Net


@pytest.fixture
def training():
    """training(optimizer class or factory, **options) after two steps."""

    def build(optimizer=torch.optim.Adam, *, ranks=(8, 6), dtype=torch.float64, steps=2, **options) -> Training:
        model = Net(ranks, dtype=dtype)
        run = Training(model, optimizer(model.parameters(), **({"lr": 1e-2} | options)))
        run.step(steps)
        return run

    return build


@pytest.fixture
def whole(training):
    """whole(optimizer class, EMA: "module", "dict" or None, **options of training)."""

    def build(optimizer=torch.optim.AdamW, ema=None, **options):
        run = training(optimizer, **options)
        run.model.register_buffer("volatile", torch.zeros(2, dtype=torch.float64), persistent=False)
        averaged = {"module": AveragedModel, "dict": lambda m: copy.deepcopy(dict(m.named_parameters()))}.get(ema)
        if averaged is not None:
            averaged = averaged(run.model)
            if isinstance(averaged, dict):
                averaged = {name: p.detach() for name, p in averaged.items()}
        return Whole(run, averaged)

    return build


def copied(value):
    """Deep copy of a tree, tensors cloned."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value


def same(left, right) -> bool:
    """Bitwise equality of trees."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


class Snapshot:
    """Values and identities of everything surgery may touch."""

    def __init__(self, model, *optimizers, ema=None) -> None:
        self.parts = (model, optimizers, ema)
        self.values, self.identities = copied(self._values()), self._identities()
        self.grads = {name: (p.grad, copied(p.grad)) for name, p in model.named_parameters()}

    def _values(self):
        model, optimizers, ema = self.parts
        averages = ema.state_dict() if isinstance(ema, nn.Module) else ema
        return {"model": dict(model.state_dict()), "optimizers": [o.state_dict() for o in optimizers], "ema": averages}

    def _identities(self):
        model, optimizers, ema = self.parts
        averages = dict(ema.named_parameters()) if isinstance(ema, nn.Module) else ema or {}
        return (
            {name: id(p) for name, p in model.named_parameters()},
            [[[id(p) for p in group["params"]] for group in o.param_groups] for o in optimizers],
            [sorted(id(p) for p in o.state) for o in optimizers],
            {name: id(p) for name, p in averages.items()},
        )

    def check(self) -> None:
        """Assert that nothing has changed, not a bit and not an object."""
        assert same(self.values, copied(self._values()))
        assert self.identities == self._identities()
        for name, p in self.parts[0].named_parameters():
            reference, value = self.grads[name]
            assert p.grad is reference
            assert same(value, copied(p.grad))


@pytest.fixture
def snapshot():
    return Snapshot
