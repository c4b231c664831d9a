"""Kimi Delta Attention: the gated delta rule with a decay for every channel of the keys, in transformers' models.

No mixture of channels that decay differently has a decay of its own, so that a subset of them stays, and any map of the queries
reads what is left.  Their libraries have one size for keys, values, the gate and the norm: a layer with fewer channels of keys
alone cannot be said there, and all channels stay in front of maps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from compressm.adapters.base import Adapter
from compressm.adapters.gated_delta_net import INDEPENDENT, GatedDeltaNetAdapter
from compressm.control import MatrixMoments, MatrixReduction, predicted_subset
from compressm.errors import bad_argument

KIMI_DELTAS = (  # of transformers, classes whose forwards are near-copies of one another
    "transformers.models.bailing_hybrid.modeling_bailing_hybrid.BailingHybridDeltaAttention",
    "transformers.models.glm5_next.modeling_glm5_next.Glm5NextTextLinearAttention",
    "transformers.models.kimi_linear.modeling_kimi_linear.KimiLinearDeltaAttention",
)


class KimiDeltaAdapter(GatedDeltaNetAdapter):
    """The maps ``k_map``, whose rows begin as channels of the keys with their decays, and ``q_map``; projected alone."""

    papers = ("kimi2025linear",)
    recurrence = ("forget_gate.dt_bias", "forget_gate.A_log")

    def __init__(self) -> None:
        super().__init__(foreign=True, form="projected")

    def independent(self, module: nn.Module) -> tuple[str, ...]:
        return (*INDEPENDENT, "forget_gate", "g_a_proj", "g_b_proj")

    def in_form(self, module: nn.Module, form: str | None) -> Adapter[MatrixReduction]:
        """Projected, where the layer's forward has maps."""
        got = f"{'auto' if form is None else form!r} for a {type(module).__qualname__} ({type(module).__module__})"
        if form == "strict":
            expected = "'projected' or 'auto', as its library has one size for keys, values, gate and norm (linear_head_dim)"
            raise bad_argument("form", got=got, expected=expected)
        if obstacle := self.obstacle(module):
            expected = "a layer with maps, as it cannot be reduced in the strict form"
            raise bad_argument("form", got=f"{got}, {obstacle}", expected=expected, remedy=self.remedy)
        return self

    def projection(self, moments: MatrixMoments, rank: int) -> MatrixReduction:
        return replace(predicted_subset(moments, rank), rows=None, method="projected, subset of keys")

    @torch.no_grad()
    def slowest(self, module: nn.Module) -> float:
        """At a token of zeros."""
        self.checked(module, "")
        gate: Any = module.get_submodule("forget_gate")
        weight = next(p for p in gate.parameters() if p.dim() == 2)
        return float(gate(weight.new_zeros(1, 1, weight.shape[1])).double().exp().max())
