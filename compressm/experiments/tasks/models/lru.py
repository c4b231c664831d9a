"""The LRU classifier of sequences: encoder, blocks, mean over time, decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

import compressm
from compressm.experiments.tasks.datasets.sequences import Sequences
from compressm.experiments.tasks.parts import BlockModel, Cut, Model
from compressm.experiments.tasks.settings import BlockSettings
from compressm.kernels import KernelPlan
from compressm.kernels.fused_cpu import standardized_linear
from compressm.layers import LayerNorm, LRUBlock


class RingSettings(BlockSettings):
    """Of models whose initial eigenvalues are drawn as of :class:`compressm.layers.LRU`."""

    r_min: float = Field(0.9, ge=0, lt=1)
    r_max: float = Field(0.999, gt=0, lt=1)
    max_phase: float = Field(6.28, gt=0, le=6.2831853)

    @model_validator(mode="after")
    def _ring(self) -> RingSettings:
        if self.r_min >= self.r_max:
            raise ValueError("r_min must be below r_max")
        return self


class LruSettings(RingSettings):
    """``ssm_lr_factor`` scales the learning rate of nu_log, theta_log, gamma_log and B, which get no weight decay; ``tau`` is
    the fraction of the sum of Hankel singular values that a reduction discards, in ``attempts`` reductions; ``rank`` asks for
    so many states in its place.
    """

    dropout: float = Field(0.1, ge=0, lt=1)
    ssm_lr_factor: float = Field(1.0, gt=0)
    tau: float = Field(0.02, ge=0, lt=1)
    rank: int | None = Field(None, ge=1)
    attempts: int = Field(1, ge=1)
    recipe: Literal["default", "paper"] = "default"
    multiple_of: int = Field(1, ge=1)


class Classifier(BlockModel):
    """Class scores of a sequence of uint8 pixels.

    Args:
        channels, classes: of the data.
        d_model: H.
        d_states: states of every block.
        mean, std: (channels,) of the pixels, kept as buffers.
        dropout, r_min, r_max, max_phase: see :class:`compressm.layers.LRUBlock`.
    """

    mixer = "lru"
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        channels: int,
        classes: int,
        d_model: int,
        d_states: Sequence[int],
        *,
        mean: Tensor,
        std: Tensor,
        dropout: float = 0.0,
        r_min: float = 0.9,
        r_max: float = 0.999,
        max_phase: float = 6.28,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())
        self.encoder = nn.Linear(channels, d_model)
        self.blocks = nn.ModuleList(
            LRUBlock(d_model, n, dropout=dropout, r_min=r_min, r_max=r_max, max_phase=max_phase) for n in d_states
        )
        self.norm = LayerNorm(d_model)
        self.decoder = nn.Linear(d_model, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (batch, L, channels), any real dtype -> scores (batch, classes)."""
        x = standardized_linear(pixels, self.mean, self.std, self.encoder.weight, self.encoder.bias)
        for block in self.blocks:
            x = block(x)
        return self.decoder(self.norm.mean_over_time(x))


def parameter_groups(model: nn.Module, lr: float, ssm_lr_factor: float, weight_decay: float) -> list[dict]:
    """AdamW groups: the recurrence (nu, theta, gamma, B) with its own rate and no decay, the rest as usual."""
    recurrent = {"nu_log", "theta_log", "gamma_log", "B_re", "B_im"}
    named = list(model.named_parameters())
    ssm = [p for name, p in named if name.rpartition(".")[2] in recurrent]
    rest = [p for name, p in named if name.rpartition(".")[2] not in recurrent]
    return [
        {"params": rest, "lr": lr, "weight_decay": weight_decay},
        {"params": ssm, "lr": lr * ssm_lr_factor, "weight_decay": 0.0},
    ]


class Lru(Model):
    """Which class a sequence of pixels belongs to, by blocks of LRUs."""

    name = "lru"
    Settings = LruSettings
    settings: LruSettings
    reads = Sequences
    mixer = "lru"

    def small_states(self) -> list[int] | None:
        """What tau keeps is known when it is cut."""
        return None if self.settings.rank is None else [self.settings.rank] * self.settings.blocks

    def build(self, data: Sequences, states: Sequence[int]) -> Classifier:
        s, (mean, std) = self.settings, data.statistics()
        ring = {"r_min": s.r_min, "r_max": s.r_max, "max_phase": s.max_phase}
        channels = data.train_x.shape[-1]
        return Classifier(channels, data.classes, s.d_model, states, mean=mean, std=std, dropout=s.dropout, **ring)

    def blank(self, facts: Mapping[str, Any]) -> Classifier:
        channels, classes = int(facts["channels"]), int(facts["classes"])
        blank, dropout = torch.zeros(channels), self.settings.dropout
        return Classifier(channels, classes, self.settings.d_model, self.full_states(), mean=blank, std=blank, dropout=dropout)

    def parameter_groups(self, model: nn.Module) -> list[dict]:
        return parameter_groups(model, self.settings.lr, self.settings.ssm_lr_factor, self.settings.weight_decay)

    @property
    def cut(self) -> Cut:
        s = self.settings
        policy = compressm.Energy(tau=s.tau) if s.rank is None else compressm.FixedRank(s.rank)
        return Cut(policy, s.attempts, s.recipe, s.multiple_of)

    def check(self, *, reduced: bool) -> None:
        s = self.settings
        if reduced and s.rank is not None and s.rank >= s.d_state:
            raise ValueError(f"rank = {s.rank} must be below d_state = {s.d_state}")

    def kernel_plan(self, length: int, device: torch.device) -> KernelPlan:
        N, H = self.settings.d_state, self.settings.d_model
        shapes = {"u": (self.settings.batch_size, length, H), "B": (N, H), "C": (H, N)}
        return compressm.kernels.plan("lti_scan", shapes, device=device)
