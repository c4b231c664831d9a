"""Training with the Hankel nuclear norm of the layers in the loss, then truncation and fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor

from compressm.experiments.methods.base import Look
from compressm.experiments.methods.finetuned import Finetuned, FinetunedSettings
from compressm.experiments.methods.spectra import hankel_norms

if TYPE_CHECKING:
    from compressm.experiments.tasks.parts import Model, Outcome
    from compressm.experiments.training import TrainingRun


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
        return run.settings.hankel_weight * hankel_norms(run).to(outcome.loss)
