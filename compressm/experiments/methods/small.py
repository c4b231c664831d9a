"""The model that is as small from the start as the compressed one ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compressm.experiments.methods.base import Look, Method
from compressm.experiments.methods.compressed import Compressed
from compressm.experiments.tasks.settings import Settings

if TYPE_CHECKING:
    from compressm.experiments.tasks.parts import Model
    from compressm.experiments.tasks.task import Task
    from compressm.experiments.training import TrainingRun


class Small(Method):
    """Takes over the states that the compressed run ended with; where there is none, what the model knows beforehand."""

    name = "small"
    title = "small from scratch"
    phrase = "the run that was small from the start"
    look = Look("#d55e00", "#f2893c", line=(0, (4, 1.6)), layer=3.0)
    reduced = True

    def check(self, settings: Settings, model: Model) -> None:
        if model.small_states() is None and settings.runs[0] != Compressed.name:
            raise ValueError(f"small runs take their states from {Compressed.name!r}, which must be the first run")

    def states(self, task: Task, finished: Sequence[TrainingRun]) -> list[int]:
        compressed = next((run for run in finished if run.name == Compressed.name), None)
        return task.model.small_states() if compressed is None else compressed.model.states
