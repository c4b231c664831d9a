"""The compressed run without calibration data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compressm.experiments.methods.base import Look
from compressm.experiments.methods.same_cut import SameCut

if TYPE_CHECKING:
    from compressm.experiments.training import TrainingRun


class CompressedDataFree(SameCut):
    """Cut as the compressed run is, but white noise stands in for the data."""

    name = "compressed_data_free"
    title = "compressed, data-free"
    phrase = "the run compressed without data"
    look = Look("#1f4e79", "#8ab6dc", line=(0, (2, 1)), marker="d", width=1.8, layer=2.47)

    def options(self, run: TrainingRun) -> dict[str, Any]:
        return {"form": run.task.model.cut.form}
