"""Pruning by the size of parameters after training, then fine-tuning."""

from __future__ import annotations

from compressm.control import Magnitude
from compressm.experiments.methods.base import Look
from compressm.experiments.methods.finetuned import Finetuned


class AfterMagnitude(Finetuned):
    """Keeps the states with the largest parameters."""

    name = "after_magnitude"
    title = "magnitude pruning after training"
    phrase = "the run that was pruned by magnitude after training"
    look = Look("#8b4513", "#d2a679", line=(0, (2, 1, 0.6, 1)), marker="<", layer=2.8)
    criterion = Magnitude()
