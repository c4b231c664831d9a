"""Kimi Delta Attention: the gated delta rule with a decay for every channel of the keys.

No mixture of channels that decay differently has a decay of its own, so that a subset of them stays.

* flash-linear-attention's has sizes of its own for keys and values: the channels that go take their decays along.
* transformers' have one size for keys, values, the gate and the norm: a layer with fewer channels of keys alone cannot be said
  there.  All channels stay in front of maps, and any map of the queries reads what is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from compressm.adapters.base import Adapter, Distiller, LayerEdit
from compressm.adapters.gated_delta_net import INDEPENDENT, GatedDeltaNetAdapter
from compressm.adapters.matrix import Rows
from compressm.adapters.parameters import label, own_parameter, parameter_at
from compressm.control import MatrixMoments, MatrixReduction, predicted_subset
from compressm.errors import ModelError, bad_argument
from compressm.layers.gated_delta_mixer import layout, read

KIMI_DELTAS = (  # of transformers, classes whose forwards are near-copies of one another
    "transformers.models.bailing_hybrid.modeling_bailing_hybrid.BailingHybridDeltaAttention",
    "transformers.models.glm5_next.modeling_glm5_next.Glm5NextTextLinearAttention",
    "transformers.models.kimi_linear.modeling_kimi_linear.KimiLinearDeltaAttention",
)


class KimiDeltaAttentionAdapter(GatedDeltaNetAdapter):
    """flash-linear-attention's: channels of keys and queries behind short convolutions, and what makes their decays."""

    papers = ("kimi2025linear",)

    def independent(self, module: nn.Module) -> tuple[str, ...]:
        return (*INDEPENDENT, "f_proj")

    def shape(self, module: nn.Module) -> tuple[int, int]:
        if parameter_at(module, "q_conv1d.weight") is None:
            expected = "short convolutions with SiLU (use_short_conv=True)"
            raise ModelError(f"{label(module)} has no q_conv1d.weight, expected {expected}")
        return super().shape(module)

    def rows(self, module: nn.Module) -> Mapping[str, Rows]:
        """Heads of values that share keys have decays of their own."""
        groups, features = self.shape(module)
        shape = groups, layout(module).heads // groups, features
        index = torch.arange(math.prod(shape), device="cpu").view(shape)
        return {**super().rows(module), "f_proj.1.weight": index.unbind(1), "dt_bias": index.unbind(1)}

    def attributes(self, module: nn.Module, rank: int) -> dict[str, Any]:
        found = super().attributes(module, rank)
        gates = layout(module).heads * rank
        return found | {"gate_dim": gates, "f_proj.1.out_features": gates} if found else found

    def projection(self, moments: MatrixMoments, rank: int) -> MatrixReduction:
        return _projected_subset(moments, rank)

    def distiller(self, module: nn.Module, edit: LayerEdit) -> Distiller | None:
        """Of the strict form: a map of keys would change the decays with it."""
        return None if self.maps(module) else super().distiller(module, edit)

    @torch.no_grad()
    def slowest(self, module: nn.Module) -> float:
        """At a token of zeros."""
        self.checked(module, "")
        weight = own_parameter(module, "q_proj.weight")
        return float(read(module, weight.new_zeros(1, 1, weight.shape[1])).g.double().exp().max())

    def check_sizes(self, module: nn.Module, name: str) -> None:
        super().check_sizes(module, name)
        sizes, decays = layout(module), own_parameter(module, "dt_bias").numel()
        if decays != sizes.heads * sizes.features:
            got = f"{decays} decays for {sizes.heads} heads of values and {sizes.features} channels of keys each"
            raise ModelError(f"{label(module, name)}: {got}, expected one for each")


class KimiDeltaAdapter(GatedDeltaNetAdapter):
    """transformers': the maps ``k_map``, whose rows begin as channels of the keys with their decays, and ``q_map``.

    Projected alone.
    """

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
        return _projected_subset(moments, rank)

    @torch.no_grad()
    def slowest(self, module: nn.Module) -> float:
        """At a token of zeros."""
        self.checked(module, "")
        gate: Any = module.get_submodule("forget_gate")
        weight = next(p for p in gate.parameters() if p.dim() == 2)
        return float(gate(weight.new_zeros(1, 1, weight.shape[1])).double().exp().max())


def _projected_subset(moments: MatrixMoments, rank: int) -> MatrixReduction:
    return replace(predicted_subset(moments, rank), rows=None, method="projected, subset of keys")
