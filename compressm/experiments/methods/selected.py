"""What methods have in common that keep the states which a published criterion ranks highest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from compressm.control import Criterion, RandomModes, RowCriterion
from compressm.experiments.methods.same_cut import SameCut

if TYPE_CHECKING:
    from compressm.experiments.tasks.parts import Model
    from compressm.experiments.training import TrainingRun

KINDS = {Criterion: "modes of time-invariant layers", RowCriterion: "rows of matrix-valued or selective states"}


class Selected(SameCut):
    """Cut when the compressed run is, to the states that a criterion chooses.

    Attributes:
        criterion: it, or the kind that has a seed of the run's.
    """

    criterion: ClassVar[Criterion | RowCriterion]

    def unfit(self, model: type[Model]) -> str:
        return unfit_for(self.criterion, model)

    def check(self, settings: Any, model: Model) -> None:
        super().check(settings, model)
        check_unmapped(self.name, settings)

    def options(self, run: TrainingRun) -> dict[str, Any]:
        return {"criterion": self.criterion, "calibration": seen_by(self.criterion, run)}


def unfit_for(criterion: Criterion | RowCriterion, model: type[Model]) -> str:
    """Why a criterion cannot choose among the states of a family of models; else empty."""
    if isinstance(criterion, model.criteria):
        return ""
    kinds = " or ".join(words for kind, words in KINDS.items() if isinstance(criterion, kind))
    return f"ranks {kinds}, the model {model.name!r} has none"


def seen_by(criterion: Criterion | RowCriterion, run: TrainingRun) -> Any:
    """The batches that a criterion looks at; modes are ranked without, and so is chance."""
    measured = isinstance(criterion, RowCriterion) and not isinstance(criterion, RandomModes)
    return run.task.calibration() if measured else None


def check_unmapped(method: str, settings: Any) -> None:
    """Raise ValueError where the layers of all runs mix the states that a method would choose among."""
    if (features := getattr(settings, "d_features", None)) is not None:
        raise ValueError(f"with d_features = {features} layers have maps that mix states: leave it out, or {method!r}")
