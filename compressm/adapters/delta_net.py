"""flash-linear-attention's DeltaNet: the delta rule without decays."""

from __future__ import annotations

from typing import Any

from torch import nn

from compressm.adapters.gated_delta_net import GatedDeltaNetAdapter
from compressm.adapters.parameters import check_finite, expansion, label, plain_parameters
from compressm.errors import ModelError
from compressm.layers.gated_delta_mixer import layout


class DeltaNetAdapter(GatedDeltaNetAdapter):
    """Channels of keys and queries, behind short convolutions with SiLU and a norm to length one, its defaults."""

    papers = ("yang2024parallelizing",)
    recurrence = ("b_proj.weight",)  # of beta alone

    def checked(self, module: nn.Module, name: str) -> dict[str, nn.Parameter]:
        """What the rule depends on and what changes, finite.

        Raises:
            ModelError, NumericalError: a parameter is missing or not finite, or the layer is made in another way.
        """
        usual = {"use_short_conv": True, "use_beta": True, "qk_activation": "silu", "qk_norm": "l2"}
        if other := {key: getattr(module, key) for key, value in usual.items() if getattr(module, key) != value}:
            got = ", ".join(f"{key}={value!r}" for key, value in other.items())
            expected = ", ".join(f"{key}={usual[key]!r}" for key in other)
            raise ModelError(f"{label(module, name)}: {got}, expected {expected}")
        parameters = plain_parameters(module, (*self.recurrence, *self.parameters(module)), name)
        check_finite(module, parameters, name)
        self.check_sizes(module, name)
        return parameters

    def slowest(self, module: nn.Module) -> float:
        """What no key erases stays."""
        self.checked(module, "")
        return 1.0

    def attributes(self, module: nn.Module, rank: int) -> dict[str, Any]:
        found = super().attributes(module, rank)
        width = {"expand_k": expansion(layout(module).key_heads * rank, vars(module)["hidden_size"])}
        return found | width if found else found
