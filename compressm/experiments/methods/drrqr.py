"""Rank-revealing QR of queries and keys, when the compressed run is cut."""

from __future__ import annotations

from compressm.control import DRRQR
from compressm.experiments.methods.base import Look
from compressm.experiments.methods.selected import Selected


class Drrqr(Selected):
    """Keeps the channels from which strong rank-revealing QR predicts the others (Nazari and Rusch, 2026)."""

    name = "drrqr"
    title = "cut by DRRQR"
    phrase = "the run that was cut by DRRQR in training"
    look = Look("#b71c4a", "#ef8aa8", line=(0, (3, 1.2, 0.8, 1.2)), marker="h", layer=2.65)
    criterion = DRRQR()
