"""The model that shrinks while it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor

import compressm
from compressm.experiments.methods.base import Look, Method
from compressm.experiments.methods.spectra import hankel_norms
from compressm.experiments.tasks.settings import Settings

if TYPE_CHECKING:
    from compressm.experiments.tasks.parts import Model, Outcome
    from compressm.experiments.training import TrainingRun


class CompressedSettings(Settings):
    """The reductions are spread evenly up to the fraction ``reduce_until`` of the steps; at the first that removes states
    ``lr_after`` multiplies the learning rate, or does not.  Until then ``spectrum_weight`` times the sum of the layers' Hankel
    singular values is a part of the loss, so that states that are not needed fade (of LRUs).
    """

    reduce_until: float = Field(0.2, gt=0, le=1)
    lr_after: float | None = Field(None, gt=0)
    spectrum_weight: float = Field(0.0, ge=0)


class Compressed(Method):
    """Starts at full size; a Compressor cuts it early in training."""

    name = "compressed"
    title = "compressed in training"
    phrase = "the compressed run"
    look = Look("#0072b2", "#56b4e9", width=2.1, layer=2.5)
    Settings = CompressedSettings
    reduced = True
    shrinks = True

    def check(self, settings: CompressedSettings, model: Model) -> None:
        if settings.steps * settings.reduce_until < model.cut.attempts:
            raise ValueError("steps * reduce_until must be at least attempts: train longer or reduce later")
        if settings.spectrum_weight and model.mixer != "lru":
            raise ValueError(f"spectrum_weight must be 0, got {settings.spectrum_weight}: the model {model.name!r} has no LRUs")

    def compressor(self, run: TrainingRun) -> compressm.Compressor:
        settings, cut = run.settings, run.task.model.cut
        return compressm.Compressor(
            run.model,
            run.optimizer,
            policy=cut.policy,
            schedule=compressm.Warmup(settings.steps, settings.reduce_until, cut.attempts),
            calibration=run.task.calibration() if cut.measured else None,
            recipe=cut.recipe,
            form=cut.form,
            multiple_of=cut.multiple_of,
            sequences=settings.calibration_sequences,
            lr_after=self.rate_after(settings),
        )

    def rate_after(self, settings: CompressedSettings) -> float | None:
        """What multiplies the learning rate at the first cut."""
        return settings.lr_after

    def loss(self, run: TrainingRun, outcome: Outcome) -> Tensor | None:
        settings = run.settings
        if not settings.spectrum_weight or run.record.step >= settings.steps * settings.reduce_until:
            return None
        return settings.spectrum_weight * hankel_norms(run).to(outcome.loss)
