"""The compressed run with a larger learning rate behind its first cut."""

from __future__ import annotations

from compressm.experiments.methods.base import Look
from compressm.experiments.methods.compressed import Compressed, CompressedSettings


class CompressedFaster(Compressed):
    """Starts at full size; is cut as the compressed run is, with twice the learning rate from its first cut on."""

    name = "compressed_faster"
    title = "compressed, then twice the rate"
    phrase = "the run compressed with twice the rate behind its cut"
    look = Look("#00509e", "#8cc4f0", line=(0, (2, 1)), marker="s", width=1.8, layer=2.47)

    def rate_after(self, settings: CompressedSettings) -> float:
        return 2.0
