"""The model that is as small from the start as the compressed one ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compressm.experiments.methods.base import Look, Method
from compressm.experiments.methods.compressed import Compressed

if TYPE_CHECKING:
    from compressm.experiments.tasks.parts import Model
    from compressm.experiments.tasks.task import Task
    from compressm.experiments.training import TrainingRun


def sized_by(model: Model) -> tuple[str, ...]:
    """The methods whose runs say how small a model shall be; none where that is known beforehand."""
    return (Compressed.name,) if model.small_states() is None else ()


def small_states(task: Task, finished: Sequence[TrainingRun]) -> list[int]:
    """States of every block of a small model: those that the compressed run ended with, or what the model knows beforehand."""
    compressed = next((run for run in finished if run.name == Compressed.name), None)
    states = task.model.small_states() if compressed is None else compressed.model.states
    assert states is not None  # see sized_by
    return states


class Small(Method):
    """Takes over the states that the compressed run ended with; where there is none, what the model knows beforehand."""

    name = "small"
    title = "small from scratch"
    phrase = "the run that was small from the start"
    look = Look("#d55e00", "#f2893c", line=(0, (4, 1.6)), layer=3.0)
    reduced = True

    def needs(self, settings: Any, model: Model) -> tuple[str, ...]:
        return sized_by(model)

    def states(self, task: Task, finished: Sequence[TrainingRun]) -> list[int]:
        return small_states(task, finished)
