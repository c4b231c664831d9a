"""A random choice of states after training, then fine-tuning."""

from __future__ import annotations

from compressm.control import RandomModes
from compressm.experiments.methods.base import Look
from compressm.experiments.methods.finetuned import Finetuned, FinetunedSettings


class AfterRandom(Finetuned):
    """Keeps states by chance."""

    name = "after_random"
    title = "random states after training"
    phrase = "the run that was cut at random after training"
    look = Look("#4a3380", "#967fc4", line=(0, (1, 1)), marker="^", layer=2.75)
    criterion = RandomModes()

    def chosen_by(self, settings: FinetunedSettings) -> RandomModes:
        return RandomModes(settings.seed)
