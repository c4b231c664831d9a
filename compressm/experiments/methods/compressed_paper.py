"""The authors' recipe, at the compressed run's step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compressm.control import RowCriterion
from compressm.experiments.methods.base import Look
from compressm.experiments.methods.same_cut import SameCut

if TYPE_CHECKING:
    from compressm.experiments.tasks.parts import Model
    from compressm.experiments.training import TrainingRun


class CompressedPaper(SameCut):
    """Cut by recipe ``paper``: the complex spectrum, moments sliced, and data for selective layers alone."""

    name = "compressed_paper"
    title = "compressed, paper's recipe"
    phrase = "the run compressed by the paper's recipe"
    look = Look("#005f8f", "#7cc4ea", line=(0, (5, 1)), marker="d", width=1.8, layer=2.48)

    def unfit(self, model: type[Model]) -> str:
        matrix = "form" in model.Settings.model_fields or model.criteria is type(None)
        return f"has no way to reduce matrix-valued states, which the model {model.name!r} has" if matrix else ""

    def options(self, run: TrainingRun) -> dict[str, Any]:
        selective = run.task.model.criteria is RowCriterion
        return {"recipe": "paper", "calibration": run.task.calibration() if selective else None}
