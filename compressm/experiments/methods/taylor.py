"""The states whose weights are felt most, when the compressed run is cut."""

from __future__ import annotations

from compressm.control import Taylor
from compressm.experiments.methods.base import Look
from compressm.experiments.methods.selected import Selected


class TaylorKept(Selected):
    """Keeps the states whose weights the output feels most to first order (Molchanov et al., 2019)."""

    name = "taylor"
    title = "cut by Taylor scores"
    phrase = "the run that was cut by Taylor scores in training"
    look = Look("#a65c00", "#e5a85a", line=(0, (3, 1.2, 0.8, 1.2)), marker="h", layer=2.65)
    criterion = Taylor()
