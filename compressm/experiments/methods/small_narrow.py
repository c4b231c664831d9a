"""The small model whose initial phases are narrow: a control for what of a small model's loss is its initialisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from compressm.experiments.methods.base import Look
from compressm.experiments.methods.small import Small
from compressm.experiments.tasks.settings import Settings

if TYPE_CHECKING:
    from compressm.experiments.tasks.parts import Model


class NarrowSettings(Settings):
    """``narrow_max_phase`` stands in the place of the model's ``max_phase``."""

    narrow_max_phase: float = Field(0.314, gt=0, le=6.2831853)


class SmallNarrow(Small):
    """Small from the start, its eigenvalues' phases in a narrow range."""

    name = "small_narrow"
    title = "small, narrow phases"
    phrase = "the small one with narrow initial phases"
    look = Look("#00825f", "#35c79c", line=(0, (1, 1.4)), layer=3.5)
    Settings = NarrowSettings

    def unfit(self, model: type[Model]) -> str:
        if "max_phase" in model.Settings.model_fields:
            return ""
        return f"changes initial phases (max_phase), the model {model.name!r} has none"

    def replaced(self, settings: NarrowSettings) -> dict[str, float]:
        return {"max_phase": settings.narrow_max_phase}
