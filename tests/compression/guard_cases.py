"""A scripted metric, and a run with everything that a rollback has to put back, shared by the guard's tests."""

from __future__ import annotations

import copy
import random

import numpy as np
import torch
from torch import nn

import compressm


class Script:
    """A metric that gives the listed values in turn, then the last one for ever."""

    def __init__(self, *values):
        self.values, self.calls = list(values), 0

    def __call__(self, model):
        assert not model.training
        assert not torch.is_grad_enabled()
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        model.norms[0].running_mean.add_(1)
        value = self.values[min(self.calls, len(self.values) - 1)]
        self.calls += 1
        return value


def same(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


class Whole:
    """A run with everything that real ones have: scheduler, EMA, data order and a counter."""

    def __init__(self, run, ema=None):
        self.run, self.model, self.optimizer, self.ema = run, run.model, run.optimizer, ema
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, 50)
        self.counters = {"batches": 0, "seen": torch.zeros(2)}

    def step(self):
        self.run.step()
        self.scheduler.step()
        self.model.volatile += torch.rand(2)
        self.counters["batches"] += 1
        self.counters["seen"] += 1
        random.random(), np.random.rand()  # noqa: NPY002
        if isinstance(self.ema, nn.Module):
            self.ema.update_parameters(self.model)
        elif self.ema is not None:
            for name, p in self.model.named_parameters():
                self.ema[name] = 0.9 * self.ema[name] + 0.1 * p.detach()

    def state(self):
        ema = self.ema.state_dict() if isinstance(self.ema, nn.Module) else self.ema
        tree = {
            "model": dict(self.model.named_parameters()) | dict(self.model.named_buffers()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "ema": dict(ema or {}),
            "data": self.run.random.get_state(),
            "counters": self.counters,
            "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
        }
        return copy.deepcopy(tree)

    def guarded(self, guard, policy=None, schedule=None, **options):
        policy, schedule = policy or compressm.FixedRank(3), schedule or compressm.At([3], total_steps=100)
        compressor = compressm.Compressor(
            self.model, self.optimizer, policy=policy, schedule=schedule, guard=guard, ema=self.ema, **options
        )
        compressor.register(scheduler=self.scheduler, data=self.run.random, counters=self.counters)
        return compressor

    def steps(self, compressor, count):
        reports = []
        for _ in range(count):
            self.step()
            reports.append(compressor.step())
        return reports
