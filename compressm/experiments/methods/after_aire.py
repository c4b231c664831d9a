"""AIRE after training, then fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import compressm
from compressm.control import AIRE
from compressm.experiments.methods.base import Look
from compressm.experiments.methods.finetuned import Finetuned
from compressm.experiments.methods.small import small_states

if TYPE_CHECKING:
    from compressm.experiments.training import TrainingRun


class AfterAire(Finetuned):
    """Keeps the best states of all layers by one threshold (AIRE-Prune, ICLR 2026), as many as the compressed run."""

    name = "after_aire"
    title = "AIRE after training"
    phrase = "the run that was pruned by AIRE after training"
    look = Look("#5d4037", "#bcaaa4", line=(0, (4, 1, 0.6, 1)), marker=">", layer=2.9)
    criterion = AIRE()

    def policy(self, run: TrainingRun) -> compressm.Largest:
        return compressm.Largest(states=sum(small_states(run.task, run.finished)))
