"""States kept by GHOST after training, then fine-tuning."""

from __future__ import annotations

from compressm.control import GHOST
from compressm.experiments.methods.base import Look
from compressm.experiments.methods.finetuned import Finetuned


class AfterGhost(Finetuned):
    """The choice by GHOST, made when training is over."""

    name = "after_ghost"
    title = "GHOST after training"
    phrase = "the run that was cut by GHOST after training"
    look = Look("#30557a", "#7596b7", line=(0, (2, 1, 0.6, 1)), marker="X", layer=2.85)
    criterion = GHOST()
