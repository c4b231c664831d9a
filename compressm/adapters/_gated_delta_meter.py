"""What the gated delta rules of a model's layers are given on calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from compressm.adapters._moment_meter import MomentMeter
from compressm.control import MatrixMoments
from compressm.layers.gated_delta_mixer import read


class GatedDeltaMeter(MomentMeter):
    """E[k k^T], E[q q^T] and E[beta^2 k k^T] over all tokens, beta^2 being the mean over the heads that share a key."""

    letters = ("E[k k^T]", "E[q q^T]", "E[beta^2 k k^T]")

    def vectors(self, module: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        inputs = read(module, hidden, kwargs.get("attention_mask"))
        beta = inputs.beta.to(inputs.k.dtype).unflatten(-1, (inputs.k.shape[2], -1)).square().mean(-1).sqrt()
        return inputs.k, inputs.q, beta[..., None] * inputs.k

    def moments(self, keys: Tensor, queries: Tensor, *others: Tensor) -> MatrixMoments:
        moments = super().moments(keys, queries)
        return replace(moments, Q=queries + others[0], erased=others[0])
