"""Language models of Mamba layers."""

from __future__ import annotations

import torch

import compressm
from compressm.experiments.tasks.models.language_model import TokenModel
from compressm.kernels import KernelPlan
from compressm.layers import Mamba


class MambaModel(TokenModel):
    """Which token comes next, by blocks of Mamba layers."""

    name = mixer = "mamba"
    notes = ("States are counted per channel, as d_state of Mamba is.",)

    def layer(self, states: int) -> Mamba:
        return Mamba(self.settings.d_model, states, expand=self.settings.expand)

    def kernel_plan(self, length: int, device: torch.device) -> KernelPlan:
        inner = self.settings.expand * self.settings.d_model
        shapes = {"u": (self.settings.batch_size, inner, length), "A": (inner, self.settings.d_state)}
        return compressm.kernels.plan("selective_scan", shapes, device=device)
