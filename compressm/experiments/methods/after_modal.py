"""Modal truncation after training, then fine-tuning."""

from __future__ import annotations

from compressm.control import PeakGain
from compressm.experiments.methods.base import Look
from compressm.experiments.methods.finetuned import Finetuned


class AfterModal(Finetuned):
    """Keeps the modes with the largest gain, which is the order of LAST."""

    name = "after_modal"
    title = "modal truncation after training"
    phrase = "the run that was cut to its dominant modes after training"
    look = Look("#303f9f", "#9fa8da", line=(0, (4, 1, 0.6, 1)), marker=">", layer=2.9)
    criterion = PeakGain()
