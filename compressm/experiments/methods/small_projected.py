"""The small model with the architecture that a projected cut leaves: a control for what is the architecture's gain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressm.experiments.methods.base import Look
from compressm.experiments.methods.small import Small

if TYPE_CHECKING:
    from compressm.experiments.tasks.models.mamba2 import Mamba2Settings
    from compressm.experiments.tasks.parts import Model


class SmallProjected(Small):
    """Small from the start, behind as many features as the full size has states, and maps that are trained from step 0."""

    name = "small_projected"
    title = "small, projected architecture"
    phrase = "the small one with the projected architecture"
    look = Look("#7450b8", "#b59cf2", line=(0, (6, 1.6, 1, 1.6)), layer=3.4)

    def unfit(self, model: type[Model]) -> str:
        if "d_features" in model.Settings.model_fields:
            return ""
        return f"has maps between features and states (d_features), the model {model.name!r} has none"

    def check(self, settings: Mamba2Settings, model: Model) -> None:
        super().check(settings, model)
        if settings.d_features is not None:
            raise ValueError(
                f"with d_features = {settings.d_features} the models of all runs have the projected architecture: "
                f"leave it out, or run {Small.name!r} in the place of {self.name!r}"
            )

    def replaced(self, settings: Mamba2Settings) -> dict[str, int]:
        return {"d_features": settings.d_state}
