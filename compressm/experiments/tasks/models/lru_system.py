"""Linear systems in series: LRUs alone, for the identification of systems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

import compressm
from compressm.experiments.tasks.datasets.signals import Signals
from compressm.experiments.tasks.models.lru import RingSettings, parameter_groups
from compressm.experiments.tasks.parts import BlockModel, Cut, Model
from compressm.kernels import KernelPlan
from compressm.layers import LRU


class LruSystemSettings(RingSettings):
    """``rank`` is the number of states that a reduction leaves in every layer, or with ``error_bound`` as few as keep the bound
    of the layer's error below that share of its gain.  With ``feedthrough=False`` the skips start at zero.  The channels are
    those of the data.
    """

    rank: int = Field(12, ge=1)
    error_bound: float | None = Field(None, gt=0)
    feedthrough: bool = True


class LinearBlock(nn.Module):
    """One linear system.

    Args:
        channels: in and out.
        d_state: complex states.
        feedthrough: whether the skip is drawn, or begins at zero.
        ring: r_min, r_max and max_phase of :class:`compressm.layers.LRU`.
    """

    def __init__(self, channels: int, d_state: int, feedthrough: bool = True, **ring: Any) -> None:
        super().__init__()
        self.lru = LRU(channels, d_state, **ring)
        if not feedthrough:
            nn.init.zeros_(self.lru.D)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, L, channels) -> the same shape."""
        return self.lru(x)


class LinearModel(BlockModel):
    """Linear systems one after the other.

    Args:
        channels: in and out.
        d_states: states of every system.
        feedthrough, ring: see :class:`LinearBlock`.
    """

    mixer = "lru"

    def __init__(self, channels: int, d_states: Sequence[int], feedthrough: bool = True, **ring: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(LinearBlock(channels, n, feedthrough, **ring) for n in d_states)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, L, channels) -> the same shape."""
        for block in self.blocks:
            x = block(x)
        return x


class LruSystem(Model):
    """Which signal a system answers with, by LRUs alone."""

    name = "lru_system"
    Settings = LruSystemSettings
    settings: Any  # LruSystemSettings, with the ``channels`` of the dataset
    reads = Signals
    mixer = "lru"

    def small_states(self) -> list[int] | None:
        return None if self.settings.error_bound else [self.settings.rank] * self.settings.blocks

    def build(self, data: Signals, states: Sequence[int]) -> LinearModel:
        s = self.settings
        ring = {"r_min": s.r_min, "r_max": s.r_max, "max_phase": s.max_phase}
        return LinearModel(data.train_x.shape[-1], states, s.feedthrough, **ring)

    def blank(self, facts: Mapping[str, Any]) -> LinearModel:
        return LinearModel(int(facts["inputs"]), self.full_states())

    def parameter_groups(self, model: nn.Module) -> list[dict]:
        return parameter_groups(model, self.settings.lr, 1.0, self.settings.weight_decay)

    @property
    def cut(self) -> Cut:
        s = self.settings
        if s.error_bound is None:
            return Cut(compressm.FixedRank(s.rank))
        return Cut(compressm.ErrorBound(s.error_bound), data_free=True)

    def kernel_plan(self, length: int, device: torch.device) -> KernelPlan:
        N, H = self.settings.d_state, self.settings.channels
        shapes = {"u": (self.settings.batch_size, length, H), "B": (N, H), "C": (H, N)}
        return compressm.kernels.plan("lti_scan", shapes, device=device)

    def check(self, *, reduced: bool) -> None:
        s = self.settings
        if reduced and s.error_bound is None and s.rank >= s.d_state:
            raise ValueError(f"rank = {s.rank} must be below d_state = {s.d_state}")
