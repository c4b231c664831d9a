"""What methods have in common that train at full size, cut at the end, and train on: in as many steps as all others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

import compressm
from compressm.control import Criterion, RowCriterion
from compressm.experiments.methods.base import Method
from compressm.experiments.methods.same_cut import to_states
from compressm.experiments.methods.selected import check_unmapped, seen_by, unfit_for
from compressm.experiments.methods.small import sized_by, small_states
from compressm.experiments.tasks.rates import Rate, rise_and_fall
from compressm.experiments.tasks.settings import Settings, SettingsClass

if TYPE_CHECKING:
    from compressm.experiments.tasks.parts import Model
    from compressm.experiments.training import TrainingRun


class FinetunedSettings(Settings):
    """The last fraction ``finetune`` of the steps comes after the cut, with ``finetune_lr`` times the learning rate."""

    finetune: float = Field(0.3, gt=0, lt=1)
    finetune_lr: float = Field(0.3, gt=0)


class Finetuned(Method):
    """Full size with a whole schedule of the learning rate, cut when that is over, then a second one for what is left.

    Attributes:
        criterion: what ranks the states; None: balanced truncation with data Gramians.
    """

    Settings: ClassVar[SettingsClass] = FinetunedSettings
    reduced = True
    criterion: ClassVar[Criterion | RowCriterion | None] = None

    def unfit(self, model: type[Model]) -> str:
        return "" if self.criterion is None else unfit_for(self.criterion, model)

    def check(self, settings: FinetunedSettings, model: Model) -> None:
        if self.criterion is not None:
            check_unmapped(self.name, settings)
        if not 0 < self.cut_after(settings) < settings.steps:
            raise ValueError("steps * finetune must leave at least one step before the cut and one after it")

    def needs(self, settings: Any, model: Model) -> tuple[str, ...]:
        return sized_by(model)

    def cut_after(self, settings: FinetunedSettings) -> int:
        """The step after which the model is cut."""
        return round(settings.steps * (1 - settings.finetune))

    def rate(self, settings: FinetunedSettings) -> Rate:
        cut = self.cut_after(settings)
        first = rise_and_fall(cut, settings.warmup, cosine=settings.cosine, least=settings.min_lr_ratio)
        second = rise_and_fall(settings.steps - cut, settings.warmup, cosine=settings.cosine, least=settings.min_lr_ratio)
        return lambda step: first(step) if step < cut else settings.finetune_lr * second(step - cut)

    def chosen_by(self, settings: FinetunedSettings) -> Criterion | RowCriterion | None:
        """What ranks the states of a run."""
        return self.criterion

    def policy(self, run: TrainingRun) -> compressm.compression.Policy:
        """How many states stay: those of the compressed run."""
        return to_states(run.task, small_states(run.task, run.finished))

    def compressor(self, run: TrainingRun) -> compressm.Compressor:
        criterion = self.chosen_by(run.settings)
        return compressm.Compressor(
            run.model,
            run.optimizer,
            policy=self.policy(run),
            schedule=compressm.At([self.cut_after(run.settings)], run.settings.steps),
            calibration=run.task.calibration() if criterion is None else seen_by(criterion, run),
            sequences=run.settings.calibration_sequences,
            criterion=criterion,
        )
