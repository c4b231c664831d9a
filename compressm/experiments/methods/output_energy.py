"""The states with the most output energy, when the compressed run is cut."""

from __future__ import annotations

from compressm.control import OutputEnergy
from compressm.experiments.methods.base import Look
from compressm.experiments.methods.selected import Selected


class OutputEnergyKept(Selected):
    """Keeps the states that add most to the output, each looked at alone."""

    name = "output_energy"
    title = "cut by output energy"
    phrase = "the run that was cut by output energy in training"
    look = Look("#556b2f", "#a9c46c", line=(0, (3, 1.2, 0.8, 1.2)), marker="h", layer=2.65)
    criterion = OutputEnergy()
