"""A small model with an LRU and a Mamba layer, trained with any optimizer, with a reduction on the way."""

from __future__ import annotations

import torch
from torch import nn

import compressm
from compressm.layers import LRU, Mamba

WIDTH, STATES = 8, 16


class Mixed(nn.Module):
    """Two numbers a step -> three classes, through one layer of each kind that is asked for."""

    def __init__(self, kinds=("lru", "mamba"), states: int = STATES, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, WIDTH, dtype=dtype)
        make = {
            "lru": lambda: LRU(WIDTH, states, max_phase=1.5, dtype=dtype),
            "mamba": lambda: Mamba(WIDTH, d_state=states).to(dtype),
        }
        self.layers = nn.ModuleList(make[kind]() for kind in kinds)
        self.head = nn.Linear(WIDTH, 3, dtype=dtype)

    def forward(self, x):
        x = self.encoder(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x.mean(1))


def batch(step: int, dtype: torch.dtype = torch.float32):
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(4, 9, 2, generator=draw, dtype=torch.float64)
    return x.to(dtype), torch.randint(3, (4,), generator=draw)


def loss_of(model, step: int):
    x, y = batch(step, next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(x).float(), y)


def train(model, optimizers, steps, compressor=None, after=lambda: None, first: int = 0):
    """Plain training; ``after`` runs between the optimizers' step and the compressor's.  Returns the losses."""
    losses = []
    for step in range(first, first + steps):
        loss = loss_of(model, step)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        after()
        if compressor is not None:
            compressor.step()
        losses.append(float(loss.detach()))
    return losses


def compressor_of(model, optimizer, rank=5, at=3, **options):
    options = {"policy": compressm.FixedRank(rank), "schedule": compressm.At([at])} | options
    return compressm.Compressor(model, optimizer, **options)


def layer_parameters(model) -> dict[str, nn.Parameter]:
    """Every parameter that a reduction replaces, by its full name."""
    return {
        f"{name}.{key}": module.get_parameter(key)
        for name, (module, adapter) in compressm.adapters.find_layers(model).items()
        for key in adapter.parameters(module)
    }
