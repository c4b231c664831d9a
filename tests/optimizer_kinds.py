"""Optimizers, a user's own among them, and the edits of a model: what the tests of optimizers and of moments share."""

from __future__ import annotations

import torch
from torch import optim

import compressm
from compressm.adapters import find_layers
from compressm.compression import register_optimizer_state
from compressm.compression.planning.plans import Calibration, analyse, make_plan


class Lion(torch.optim.Optimizer):
    """Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, algorithm 2; a user's own class."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            slow, fast = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                update = state["exp_avg"].lerp(p.grad, 1 - slow).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
                state["exp_avg"].lerp_(p.grad, 1 - fast)


class NamedLion(Lion):
    """The same, whose state has been named."""


register_optimizer_state(NamedLion, {"exp_avg": "first"})

OPTIMIZERS = {
    "sgd": (optim.SGD, {}),
    "sgd momentum": (optim.SGD, {"momentum": 0.9, "dampening": 0.1}),
    "sgd nesterov": (optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (optim.Adam, {}),
    "adamw fused": (optim.AdamW, {"fused": True}),
    "adamw foreach": (optim.AdamW, {"foreach": True}),
    "adamw amsgrad": (optim.AdamW, {"amsgrad": True}),
    "adamw tensor lr": (optim.AdamW, {"lr": torch.tensor(1e-2)}),
    "nadam": (optim.NAdam, {}),
    "radam": (optim.RAdam, {}),
    "adamax": (optim.Adamax, {}),
    "adagrad": (optim.Adagrad, {}),
    "rmsprop": (optim.RMSprop, {"momentum": 0.5, "centered": True}),
    "asgd": (optim.ASGD, {"t0": 1.0}),
    "adafactor": (optim.Adafactor, {}),
    "lion named": (NamedLion, {}),
}


def build(model, name, params=None):
    cls, options = OPTIMIZERS[name]
    return cls(model.parameters() if params is None else params, **({"lr": 1e-2} | options))


def edits_of(model, rank=5):
    layers = find_layers(model)
    planned = make_plan(analyse(model, layers, "real", Calibration()), compressm.FixedRank(rank))
    return {name: layers[name][1].edit(layers[name][0], r) for name, r in planned.reductions.items()}, layers
