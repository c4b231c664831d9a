"""Language models of linear attention layers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compressm.experiments.tasks.models.language_model import TokenModel, TokenSettings
from compressm.layers import LinearAttention


class LinearAttentionSettings(TokenSettings):
    """``heads`` share the ``expand * d_model`` channels of values; each has ``d_state`` channels of keys.

    ``decay`` is that of the layers' states, ``conv`` the taps of their short convolutions, 0 for none.
    """

    heads: int = Field(2, ge=1)
    decay: Literal["none", "fixed", "scalar", "channel"] = "scalar"
    conv: int = Field(4, ge=0)


class LinearAttentionModel(TokenModel):
    """Which token comes next, by blocks of linear attention."""

    name = mixer = "linear_attention"
    divisor = "heads"
    Settings = LinearAttentionSettings
    settings: LinearAttentionSettings
    criteria = type(None)  # queries take over what is cut of the keys, which no criterion's choice says how
    notes = ("States are counted per channel of a head's values: they are the channels of a key.",)

    def layer(self, states: int) -> LinearAttention:
        s = self.settings
        keys = states * s.heads / s.d_model
        return LinearAttention(s.d_model, s.heads, keys, s.expand, decay=s.decay, d_conv=s.conv)
