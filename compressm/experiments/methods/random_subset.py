"""The large model cut at random when the compressed one is: a control for the choice of what is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compressm.control import RandomModes
from compressm.experiments.methods.base import Look
from compressm.experiments.methods.selected import Selected

if TYPE_CHECKING:
    from compressm.experiments.training import TrainingRun


class RandomSubset(Selected):
    """Starts at full size; loses states by chance, as many and at the same step as the compressed run in its last reduction."""

    name = "random_subset"
    title = "random states kept"
    phrase = "the run that was cut at random"
    look = Look("#7a4fbf", "#b79cf0", line=(0, (3, 1.2)), marker="^", layer=2.6)
    criterion = RandomModes()

    def options(self, run: TrainingRun) -> dict[str, Any]:
        return {"criterion": RandomModes(run.settings.seed)}
