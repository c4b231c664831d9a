"""Training with the moduli of the eigenvalues in the loss, then modal truncation and fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from compressm.control import Modulus
from compressm.experiments.methods.base import Look
from compressm.experiments.methods.finetuned import Finetuned, FinetunedSettings

if TYPE_CHECKING:
    from compressm.experiments.tasks.parts import Model, Outcome
    from compressm.experiments.training import TrainingRun


class ModalL1Settings(FinetunedSettings):
    """``modal_weight`` is that of the sum of all moduli of eigenvalues in the loss."""

    modal_weight: float = Field(1e-4, ge=0)


class ModalL1(Finetuned):
    """Every step until the cut adds the l1 norm of the eigenvalues' moduli to the loss; the slowest modes are kept.

    Source: Forgione, Mejari and Piga, CDC 2024.
    """

    name = "modal_l1"
    title = "modal l1 norm"
    phrase = "the run with the moduli of its eigenvalues in the loss"
    look = Look("#455a64", "#90a4ae", line=(0, (7, 1.5, 1, 1.5)), marker="p", layer=2.45)
    Settings = ModalL1Settings
    criterion = Modulus()

    def unfit(self, model: type[Model]) -> str:
        return "" if model.mixer == "lru" else f"has eigenvalues of LRUs in its loss, the model {model.name!r} has none"

    def loss(self, run: TrainingRun, outcome: Outcome) -> Tensor | None:
        if run.record.step >= self.cut_after(run.settings):
            return None
        layers = [getattr(block, run.task.model.mixer) for block in run.model.blocks]
        return run.settings.modal_weight * torch.stack([layer.nu_log.exp().neg().exp().sum() for layer in layers]).sum()
