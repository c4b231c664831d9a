"""States kept by output energy after training, then fine-tuning."""

from __future__ import annotations

from compressm.control import OutputEnergy
from compressm.experiments.methods.base import Look
from compressm.experiments.methods.finetuned import Finetuned


class AfterOutputEnergyKept(Finetuned):
    """The choice by output energy, made when training is over."""

    name = "after_output_energy"
    title = "output energy after training"
    phrase = "the run that was cut by output energy after training"
    look = Look("#445525", "#8aa058", line=(0, (2, 1, 0.6, 1)), marker="X", layer=2.85)
    criterion = OutputEnergy()
