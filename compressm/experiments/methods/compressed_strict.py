"""The compressed run in the strict form, for layers that have two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compressm.experiments.methods.base import Look
from compressm.experiments.methods.same_cut import SameCut
from compressm.experiments.methods.selected import check_unmapped

if TYPE_CHECKING:
    from compressm.experiments.tasks.parts import Model
    from compressm.experiments.training import TrainingRun


class CompressedStrict(SameCut):
    """Cut when the compressed run is, to a subset of the states: what methods that rank states are to be compared with."""

    name = "compressed_strict"
    title = "compressed, strict form"
    phrase = "the run compressed to a subset of its states"
    look = Look("#2962ff", "#82a8ff", line=(0, (4, 1.4)), marker="d", width=1.8, layer=2.49)

    def unfit(self, model: type[Model]) -> str:
        return "" if "form" in model.Settings.model_fields else f"has a choice of forms, the model {model.name!r} has none"

    def check(self, settings: Any, model: Model) -> None:
        super().check(settings, model)
        check_unmapped(self.name, settings)

    def options(self, run: TrainingRun) -> dict[str, Any]:
        return {"form": "strict", "calibration": run.task.calibration()}
