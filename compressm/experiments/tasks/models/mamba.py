"""Language models of Mamba layers."""

from __future__ import annotations

from compressm.experiments.tasks.models.language_model import TokenModel
from compressm.layers import Mamba


class MambaModel(TokenModel):
    """Which token comes next, by blocks of Mamba layers."""

    name = mixer = "mamba"
    notes = ("States are counted per channel, as d_state of Mamba is.",)

    def layer(self, states: int) -> Mamba:
        return Mamba(self.settings.d_model, states, expand=self.settings.expand)
