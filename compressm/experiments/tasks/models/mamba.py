"""The byte-level language model: embedding, Mamba blocks, tied projection."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

import compressm
from compressm.experiments.tasks.datasets.texts import Text
from compressm.experiments.tasks.parts import Cut, Model
from compressm.experiments.tasks.settings import BlockSettings
from compressm.kernels import KernelPlan
from compressm.layers import Mamba, RMSNorm

BYTES = 256
EXPAND = 2  # inner channels of a Mamba layer per channel of the model


class MambaSettings(BlockSettings):
    """``rank`` is the number of states that a reduction leaves in every layer."""

    rank: int = Field(12, ge=1)


class MambaBlock(nn.Module):
    """x + Mamba(RMSNorm(x)), the residual block of mamba_ssm's language models.

    Args:
        d_model: channels H.
        d_state: states N per inner channel.
    """

    def __init__(self, d_model: int, d_state: int) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model, eps=1e-5)
        self.mamba = Mamba(d_model, d_state, expand=EXPAND)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, L, H) -> (batch, L, H)."""
        return x + self.mamba(self.norm(x))


class LanguageModel(nn.Module):
    """Scores of the next byte.

    Initialised as in mamba_ssm: embedding of standard deviation 0.02, projections out of the blocks divided by the square
    root of the number of residual layers.  The last projection is the embedding, transposed.

    Args:
        d_model: H.
        d_states: states of every block.
    """

    def __init__(self, d_model: int, d_states: Sequence[int]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, d_model)
        self.blocks = nn.ModuleList(MambaBlock(d_model, n) for n in d_states)
        self.norm = RMSNorm(d_model, eps=1e-5)
        nn.init.normal_(self.embedding.weight, std=0.02)
        with torch.no_grad():
            for block in self.blocks:
                block.mamba.out_proj.weight /= math.sqrt(len(self.blocks))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (batch, L), any integer dtype -> scores (batch, L, 256) of the byte behind each."""
        x = self.embedding(tokens.long())
        for block in self.blocks:
            x = block(x)
        return nn.functional.linear(self.norm(x), self.embedding.weight)

    @property
    def states(self) -> list[int]:
        """States of every block now, per inner channel."""
        return [block.mamba.d_state for block in self.blocks]


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict]:
    """AdamW groups: matrices decay; norms, biases, the embedding, A_log and D do not (mamba_ssm's and GPT's practice)."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed, kept = [], []
    for parameter in model.parameters():
        exempt = parameter.dim() < 2 or id(parameter) in embeddings or getattr(parameter, "_no_weight_decay", False)
        (kept if exempt else decayed).append(parameter)
    return [
        {"params": decayed, "lr": lr, "weight_decay": weight_decay},
        {"params": kept, "lr": lr, "weight_decay": 0.0},
    ]


class ByteMamba(Model):
    """Which byte comes next, by blocks of Mamba layers."""

    name = "mamba"
    Settings = MambaSettings
    settings: MambaSettings
    reads = Text
    mixer = "mamba"
    notes = ("States are counted per channel, as d_state of Mamba is.",)

    def small_states(self) -> list[int]:
        return [self.settings.rank] * self.settings.blocks

    def build(self, data: Text, states: Sequence[int]) -> LanguageModel:
        return LanguageModel(self.settings.d_model, states)

    def blank(self, facts: Mapping[str, Any]) -> LanguageModel:
        return LanguageModel(self.settings.d_model, self.full_states())

    def parameter_groups(self, model: nn.Module) -> list[dict]:
        return parameter_groups(model, self.settings.lr, self.settings.weight_decay)

    @property
    def cut(self) -> Cut:
        return Cut(compressm.FixedRank(self.settings.rank))

    def kernel_plan(self, length: int, device: torch.device) -> KernelPlan:
        inner = EXPAND * self.settings.d_model
        shapes = {"u": (self.settings.batch_size, inner, length), "A": (inner, self.settings.d_state)}
        return compressm.kernels.plan("selective_scan", shapes, device=device)

    def check(self, *, reduced: bool) -> None:
        s = self.settings
        if reduced and s.rank >= s.d_state:
            raise ValueError(f"rank = {s.rank} must be below d_state = {s.d_state}")
