"""Balanced truncation after training, then fine-tuning."""

from __future__ import annotations

from compressm.experiments.methods.base import Look
from compressm.experiments.methods.finetuned import Finetuned


class AfterBalanced(Finetuned):
    """The compressed run's reduction, made when training is over."""

    name = "after_balanced"
    title = "balanced truncation after training"
    phrase = "the run that was truncated after training"
    look = Look("#4d7000", "#a4c639", line=(0, (2, 1)), marker="v", layer=2.7)
