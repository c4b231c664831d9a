"""The small model that starts from well spread states of the large one: a control for what compression finds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressm.experiments.methods.base import Look
from compressm.experiments.methods.small import Small

if TYPE_CHECKING:
    from compressm.experiments.tasks.parts import BlockModel, Model
    from compressm.experiments.tasks.task import Task
    from compressm.layers import LRU


class SmallSpread(Small):
    """Small from the start; its states are a stratified subset of those that the large model starts with."""

    name = "small_spread"
    title = "small, spread states"
    phrase = "the small one with spread initial states"
    look = Look("#b8860b", "#e0b84a", line=(0, (6, 1.4, 1, 1.4)), marker="s", layer=3.4)

    def unfit(self, model: type[Model]) -> str:
        return "" if model.mixer == "lru" else f"chooses among the eigenvalues of LRUs, the model {model.name!r} has none"

    def start(self, task: Task, states: Sequence[int]) -> BlockModel:
        small, large = super().start(task, states), super().start(task, task.model.full_states())
        random = torch.Generator().manual_seed(task.settings.seed)
        for block, other in zip(small.blocks, large.blocks, strict=True):
            take_over(getattr(block, task.model.mixer), getattr(other, task.model.mixer), random)
        return small


@torch.no_grad()
def take_over(small: LRU, large: LRU, random: torch.Generator) -> None:
    """Give a layer well spread states of a larger one, whose C is scaled up as if it had been drawn for fewer."""
    chosen = spread(large.nu_log.exp().neg().exp(), large.theta_log.exp(), small.d_state, random)
    for name in ("nu_log", "theta_log", "gamma_log", "B_re", "B_im"):
        getattr(small, name).copy_(getattr(large, name)[chosen])
    scale = math.sqrt(large.d_state / small.d_state)
    for name in ("C_re", "C_im"):
        getattr(small, name).copy_(scale * getattr(large, name)[:, chosen])


def spread(radius: Tensor, phase: Tensor, count: int, random: torch.Generator) -> Tensor:
    """(count,) int64: one eigenvalue of every stratum of the phases, folded to [0, pi], with radii in a Latin square.

    Args:
        radius, phase: (N,) of the eigenvalues.
        count: at most N.
        random: of which stratum gets which part of the radii.
    """
    phase = torch.remainder(phase.cpu(), 2 * math.pi)
    order = torch.minimum(phase, 2 * math.pi - phase).argsort()
    total = len(order)
    quantile = (radius.cpu().argsort().argsort() + 0.5) / total
    wanted = (torch.randperm(count, generator=random) + 0.5) / count
    chosen = []
    for number in range(count):
        stratum = order[round(number * total / count) : round((number + 1) * total / count)]
        chosen.append(stratum[(quantile[stratum] - wanted[number]).abs().argmin()])
    return torch.stack(chosen).to(radius.device)
