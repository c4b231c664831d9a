"""Language models of Gated DeltaNet layers."""

from __future__ import annotations

from pydantic import Field

from compressm.experiments.tasks.models.language_model import MatrixSettings, TokenModel
from compressm.layers import GatedDeltaNet


class GatedDeltaNetSettings(MatrixSettings):
    """``heads`` share the ``expand * d_model`` channels of values; each has ``d_state`` channels of keys, or ``d_features``
    with maps to ``d_state`` of them.
    """

    heads: int = Field(2, ge=1)


class GatedDeltaNetModel(TokenModel):
    """Which token comes next, by blocks of Gated DeltaNet layers."""

    name = mixer = "gated_delta_net"
    divisor = "heads"
    Settings = GatedDeltaNetSettings
    settings: GatedDeltaNetSettings
    notes = (
        "States are counted per channel of a head's values: they are the channels of a key.",
        "Each reduction says its form: strict keeps a subset of the states; projected mixes them.",
    )

    def layer(self, states: int) -> GatedDeltaNet:
        s = self.settings
        keys, values = s.d_features or states, s.expand * s.d_model // s.heads
        maps = None if s.d_features is None else states
        return GatedDeltaNet(s.d_model, values / keys, head_dim=keys, num_heads=s.heads, d_state=maps)
