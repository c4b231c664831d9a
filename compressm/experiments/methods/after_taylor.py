"""States kept by Taylor scores after training, then fine-tuning."""

from __future__ import annotations

from compressm.control import Taylor
from compressm.experiments.methods.base import Look
from compressm.experiments.methods.finetuned import Finetuned


class AfterTaylorKept(Finetuned):
    """The choice by Taylor scores, made when training is over."""

    name = "after_taylor"
    title = "Taylor scores after training"
    phrase = "the run that was cut by Taylor scores after training"
    look = Look("#844900", "#bb8949", line=(0, (2, 1, 0.6, 1)), marker="X", layer=2.85)
    criterion = Taylor()
