"""The small model that learns from the trained full-size one: knowledge distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from compressm.experiments.methods.base import Look
from compressm.experiments.methods.full import Full
from compressm.experiments.methods.small import Small
from compressm.experiments.tasks.settings import Settings

if TYPE_CHECKING:
    from compressm.experiments.tasks.parts import Model, Outcome
    from compressm.experiments.training import TrainingRun


class DistilledSettings(Settings):
    """``distillation_alpha`` is the share of the teacher in the loss, ``distillation_temperature`` that of its scores."""

    distillation_alpha: float = Field(0.5, ge=0, le=1)
    distillation_temperature: float = Field(2.0, gt=0)


class Distilled(Small):
    """Small from the start, taught by the frozen full-size run as by the CompreSSM authors: alpha 0.5, temperature 2.

    The loss is alpha T^2 CE(softmax(teacher / T), softmax(student / T)) + (1 - alpha) times the objective's; for signals the
    first term is the mean squared error from the teacher's answer.
    """

    name = "distilled"
    title = "small, distilled"
    phrase = "the small one that full size taught"
    look = Look("#c2185b", "#f48fb1", line=(0, (5, 1.4, 1, 1.4, 1, 1.4)), marker="D", layer=3.2)
    Settings = DistilledSettings
    teachers = (Full.name,)

    def needs(self, settings: Any, model: Model) -> tuple[str, ...]:
        return (*self.teachers, *super().needs(settings, model))

    def loss(self, run: TrainingRun, outcome: Outcome) -> Tensor:
        objective, settings = run.task.objective, run.settings
        teacher = next(other.model for other in run.finished if other.name in self.teachers)
        teacher.eval()
        with torch.no_grad():
            taught = objective.outcome(teacher, outcome.batch).scores
        imitation = objective.imitation(outcome.scores, taught, settings.distillation_temperature)
        return settings.distillation_alpha * (imitation - outcome.loss)
