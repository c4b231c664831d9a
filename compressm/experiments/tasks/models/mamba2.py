"""Language models of Mamba-2 layers."""

from __future__ import annotations

from pydantic import Field

from compressm.experiments.tasks.models.language_model import MatrixSettings, TokenModel
from compressm.layers import Mamba2


class Mamba2Settings(MatrixSettings):
    """``headdim`` is the number of channels of a head."""

    headdim: int = Field(32, ge=1)


class Mamba2Model(TokenModel):
    """Which token comes next, by blocks of Mamba-2 layers, whose heads share B and C."""

    name = mixer = "mamba2"
    divisor = "headdim"
    Settings = Mamba2Settings
    settings: Mamba2Settings
    notes = (
        "States are counted per channel of a head, as d_state of Mamba-2 is.",
        "Each reduction says its form: strict keeps a subset of the states; projected mixes them.",
    )

    def layer(self, states: int) -> Mamba2:
        s = self.settings
        return Mamba2(s.d_model, states, expand=s.expand, headdim=s.headdim, d_features=s.d_features)
