"""Training with the Hankel nuclear norm of the layers in the loss, then truncation and fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from compressm.control import hankel_nuclear_norm
from compressm.experiments.methods.base import Look
from compressm.experiments.methods.finetuned import Finetuned, FinetunedSettings

if TYPE_CHECKING:
    from compressm.experiments.tasks.parts import Model, Outcome
    from compressm.experiments.training import TrainingRun
    from compressm.layers import LRU


class HankelNormSettings(FinetunedSettings):
    """``hankel_weight`` is that of the sum of all layers' Hankel singular values in the loss."""

    hankel_weight: float = Field(1e-4, ge=0)


class HankelNorm(Finetuned):
    """Every step until the cut adds the Hankel singular values of the layers as they are to the loss.

    Sources: Forgione, Mejari and Piga, CDC 2024; Schwerdtner et al. (hankelreg), NeurIPS 2025.
    """

    name = "hankel_norm"
    title = "Hankel nuclear norm"
    phrase = "the run with the Hankel nuclear norm in its loss"
    look = Look("#007c91", "#4dd0e1", line=(0, (7, 1.5)), marker="P", layer=2.4)
    Settings = HankelNormSettings

    def unfit(self, model: type[Model]) -> str:
        return "" if model.mixer == "lru" else f"has a norm of LRUs in its loss, the model {model.name!r} has none"

    def loss(self, run: TrainingRun, outcome: Outcome) -> Tensor | None:
        if run.record.step >= self.cut_after(run.settings):
            return None
        norms = [hankel_norm(getattr(block, run.task.model.mixer)) for block in run.model.blocks]
        return run.settings.hankel_weight * torch.stack(norms).sum().to(outcome.loss)


def hankel_norm(layer: LRU) -> Tensor:
    """The sum of a layer's Hankel singular values, differentiable in its parameters."""
    log_lam = torch.complex(-layer.nu_log.double().exp(), layer.theta_log.double().exp())
    B = layer.gamma_log.double().exp()[:, None] * torch.complex(layer.B_re.double(), layer.B_im.double())
    return hankel_nuclear_norm(log_lam, B, torch.complex(layer.C_re.double(), layer.C_im.double()))
