"""Language models of Mamba-2 layers."""

from __future__ import annotations

import torch
from pydantic import Field

import compressm
from compressm.experiments.tasks.models.language_model import MatrixSettings, TokenModel
from compressm.kernels import KernelPlan
from compressm.layers import Mamba2


class Mamba2Settings(MatrixSettings):
    """``headdim`` is the number of channels of a head."""

    headdim: int = Field(32, ge=1)


class Mamba2Model(TokenModel):
    """Which token comes next, by blocks of Mamba-2 layers, whose heads share B and C."""

    name = mixer = "mamba2"
    Settings = Mamba2Settings
    settings: Mamba2Settings
    notes = (
        "States are counted per channel of a head, as d_state of Mamba-2 is.",
        "Each reduction says its form: strict keeps a subset of the states; projected mixes them.",
    )

    def layer(self, states: int) -> Mamba2:
        s = self.settings
        return Mamba2(s.d_model, states, expand=s.expand, headdim=s.headdim, d_features=s.d_features)

    def kernel_plan(self, length: int, device: torch.device) -> KernelPlan:
        s = self.settings
        heads = s.expand * s.d_model // s.headdim
        shapes = {"x": (s.batch_size, length, heads, s.headdim), "B": (s.batch_size, length, 1, s.d_state)}
        return compressm.kernels.plan("ssd", shapes, device=device)

    def check(self, *, reduced: bool) -> None:
        super().check(reduced=reduced)
        s = self.settings
        if s.expand * s.d_model % s.headdim:
            raise ValueError(f"headdim = {s.headdim} must divide expand * d_model = {s.expand * s.d_model}")
