"""GHOST's choice of states, when the compressed run is cut."""

from __future__ import annotations

from compressm.control import GHOST
from compressm.experiments.methods.base import Look
from compressm.experiments.methods.selected import Selected


class Ghost(Selected):
    """Keeps the states that are excited and read most (Menezes and Kyrillidis, 2026)."""

    name = "ghost"
    title = "cut by GHOST"
    phrase = "the run that was cut by GHOST in training"
    look = Look("#3d6b99", "#8fb8e0", line=(0, (3, 1.2, 0.8, 1.2)), marker="h", layer=2.65)
    criterion = GHOST()
