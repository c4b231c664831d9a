"""Full size from start to end, its spectra measured on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

import compressm
from compressm.experiments.methods.base import Look, Method
from compressm.experiments.tasks.settings import Settings

if TYPE_CHECKING:
    from compressm.experiments.training import TrainingRun


class WatchedSettings(Settings):
    """Spectra are measured after every fraction ``watch`` of the steps."""

    watch: float = Field(0.05, gt=0, le=1)


class Watched(Method):
    """Nothing is cut; the report says when spectra and rankings had settled, and what a reduction would have kept."""

    name = "watched"
    title = "full size, watched"
    phrase = "the full-size run that was watched"
    look = Look("#8d6e00", "#d8bd5a", line=(0, (1, 2)), layer=2.05)
    Settings = WatchedSettings

    def compressor(self, run: TrainingRun) -> compressm.Compressor:
        settings, cut = run.settings, run.task.model.cut
        return compressm.Compressor(
            run.model,
            run.optimizer,
            policy=cut.policy,
            schedule=compressm.Watch(settings.steps, settings.watch),
            calibration=None if cut.recipe == "paper" else run.task.calibration(),
            recipe=cut.recipe,
            form=cut.form,
            multiple_of=cut.multiple_of,
            sequences=settings.calibration_sequences,
        )
