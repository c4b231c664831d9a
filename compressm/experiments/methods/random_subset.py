"""The large model cut at random when the compressed one is: a control for the choice of what is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import compressm
from compressm.control import RandomModes
from compressm.experiments.methods.base import Look
from compressm.experiments.methods.compressed import Compressed
from compressm.experiments.methods.small import sized_by, small_states

if TYPE_CHECKING:
    from compressm.experiments.tasks.parts import Model
    from compressm.experiments.tasks.task import Task
    from compressm.experiments.training import TrainingRun


class RandomSubset(Compressed):
    """Starts at full size; loses states by chance, as many and at the same step as the compressed run in its last reduction."""

    name = "random_subset"
    title = "random states kept"
    phrase = "the run that was cut at random"
    look = Look("#7a4fbf", "#b79cf0", line=(0, (3, 1.2)), marker="^", layer=2.6)

    def unfit(self, model: type[Model]) -> str:
        return "" if model.mixer == "lru" else f"keeps modes of time-invariant layers, the model {model.name!r} has none"

    def needs(self, settings: Any, model: Model) -> tuple[str, ...]:
        return sized_by(model)

    def compressor(self, run: TrainingRun) -> compressm.Compressor:
        settings = run.settings
        return compressm.Compressor(
            run.model,
            run.optimizer,
            policy=to_states(run.task, small_states(run.task, run.finished)),
            schedule=compressm.Once(settings.steps, settings.reduce_until),
            criterion=RandomModes(settings.seed),
        )


def to_states(task: Task, states: list[int]) -> compressm.FixedRank:
    """The policy that leaves every block so many states."""
    return compressm.FixedRank({f"blocks.{index}.{task.model.mixer}": count for index, count in enumerate(states)})
