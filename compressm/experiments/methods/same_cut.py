"""What methods have in common that are cut when the compressed run is, to as many states, in another way."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import compressm
from compressm.experiments.methods.compressed import Compressed, CompressedSettings
from compressm.experiments.methods.small import sized_by, small_states

if TYPE_CHECKING:
    from compressm.experiments.tasks.parts import Model
    from compressm.experiments.tasks.task import Task
    from compressm.experiments.training import TrainingRun


class SameCut(Compressed):
    """Starts at full size; loses as many states as the compressed run, at the step of that one's last reduction."""

    def needs(self, settings: Any, model: Model) -> tuple[str, ...]:
        return sized_by(model)

    def schedule(self, settings: CompressedSettings) -> compressm.compression.Schedule:
        """When it is cut."""
        return compressm.Once(settings.steps, settings.reduce_until)

    def policy(self, run: TrainingRun) -> compressm.compression.Policy:
        """To how many states."""
        return to_states(run.task, small_states(run.task, run.finished))

    @abstractmethod
    def options(self, run: TrainingRun) -> dict[str, Any]:
        """How it is cut: further arguments of the Compressor."""

    def compressor(self, run: TrainingRun) -> compressm.Compressor:
        return compressm.Compressor(
            run.model,
            run.optimizer,
            policy=self.policy(run),
            schedule=self.schedule(run.settings),
            sequences=run.settings.calibration_sequences,
            lr_after=self.rate_after(run.settings),
            **self.options(run),
        )


def to_states(task: Task, states: list[int]) -> compressm.FixedRank:
    """The policy that leaves every block so many states."""
    return compressm.FixedRank({f"blocks.{index}.{task.model.mixer}": count for index, count in enumerate(states)})
