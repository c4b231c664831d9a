"""The learning rate over a run, as a factor on its peak."""

from __future__ import annotations

import math
from collections.abc import Callable

from compressm.experiments.tasks.settings import Settings

Rate = Callable[[int], float]  # of a step, counted from 0


def learning_rate(settings: Settings) -> Rate:
    """Linear warm-up, then constant or cosine to ``min_lr_ratio``."""
    return rise_and_fall(settings.steps, settings.warmup, cosine=settings.cosine, least=settings.min_lr_ratio)


def rise_and_fall(steps: int, warmup: float, *, cosine: bool, least: float = 0.0) -> Rate:
    """Linear warm-up, then constant or a cosine.

    Args:
        steps: of the whole.
        warmup: the fraction of them with a rising rate.
        cosine: whether it falls afterwards.
        least: where it ends.
    """
    rising = warmup * steps

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        if not cosine:
            return 1.0
        return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, steps - rising)))

    return factor
