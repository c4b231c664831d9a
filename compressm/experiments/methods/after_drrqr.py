"""States kept by DRRQR after training, then fine-tuning."""

from __future__ import annotations

from compressm.control import DRRQR
from compressm.experiments.methods.base import Look
from compressm.experiments.methods.finetuned import Finetuned


class AfterDrrqr(Finetuned):
    """The choice by DRRQR, made when training is over."""

    name = "after_drrqr"
    title = "DRRQR after training"
    phrase = "the run that was cut by DRRQR after training"
    look = Look("#92163b", "#c37189", line=(0, (2, 1, 0.6, 1)), marker="X", layer=2.85)
    criterion = DRRQR()
