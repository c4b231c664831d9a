"""The compressed run that finds out by itself when its spectrum has settled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import compressm
from compressm.experiments.methods.base import Look
from compressm.experiments.methods.compressed import CompressedSettings
from compressm.experiments.methods.same_cut import SameCut

if TYPE_CHECKING:
    from compressm.experiments.tasks.parts import Model
    from compressm.experiments.training import TrainingRun


class CompressedWhenStable(SameCut):
    """Cut as the compressed run is, to as many states, at the first of the steps where ``WhenStable`` agrees."""

    name = "compressed_when_stable"
    title = "compressed when stable"
    phrase = "the run compressed when its spectrum had settled"
    look = Look("#00838f", "#6fd0da", line=(0, (3, 1, 1, 1)), marker="d", width=1.8, layer=2.46)

    def check(self, settings: CompressedSettings, model: Model) -> None:
        super().check(settings, model)
        self.schedule(settings)  # raises an ArgumentError, a ValueError, where there are too few steps

    def schedule(self, settings: CompressedSettings) -> compressm.WhenStable:
        return compressm.WhenStable(settings.steps, warmup=settings.warmup)

    def options(self, run: TrainingRun) -> dict[str, Any]:
        return {"form": run.task.model.cut.form, "calibration": run.task.calibration()}
