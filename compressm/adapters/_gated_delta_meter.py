"""What the gated delta rules of a model's layers are given on calibration data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters._tokens import real_tokens
from compressm.adapters.base import Meter, layer_input
from compressm.control import MatrixMoments
from compressm.errors import NumericalError
from compressm.layers.gated_delta_mixer import read


class GatedDeltaMeter(Meter):
    """E[k k^T], E[q q^T] and E[beta^2 k k^T] over all tokens, beta^2 being the mean over the heads that share a key.

    Args:
        groups, order: H and K of the rule.
        projection: name of the first projection, whose precision the input takes.
        device: where moments are summed.
    """

    def __init__(self, groups: int, order: int, projection: str, device: torch.device) -> None:
        super().__init__()
        self.projection = projection
        self.sums = torch.zeros(3, groups, order, order, dtype=torch.float64, device=device)
        self.tokens = 0

    @property
    def reached(self) -> bool:
        return self.tokens > 0

    def merge(self, add: Callable[[Any], Any], join: Callable[[Tensor], Tensor]) -> None:
        self.sums, self.tokens = add(self.sums), add(self.tokens)

    @torch.no_grad()
    def observe(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self.replaying:
            return
        hidden = layer_input(module, args, kwargs, self.projection)
        real = real_tokens(kwargs, hidden)
        inputs = read(module, hidden, kwargs.get("attention_mask"))
        self.tokens += int(real.sum())
        wide = torch.promote_types(inputs.k.dtype, torch.float32)
        k, q = (part[real].transpose(0, 1).to(wide) for part in (inputs.k, inputs.q))
        beta = inputs.beta[real].to(wide).unflatten(-1, (len(k), -1)).square().mean(-1).mT
        for total, left, right in zip(self.sums, (k, q, beta[..., None] * k), (k, q, k), strict=True):
            total += (left.mT @ right).double()

    def result(self, name: str) -> MatrixMoments:
        keys, queries, erased = self.sums / self.tokens
        for letters, matrix in (("E[k k^T]", keys), ("E[q q^T]", queries), ("E[beta^2 k k^T]", erased)):
            if not bool(torch.isfinite(matrix).all()):
                raise NumericalError(
                    f"calibration: {letters} of layer {name!r} is not finite, expected finite keys and queries on the "
                    "calibration data. Look for NaN or infinity in the batches"
                )
        nothing = keys.new_zeros(0, *keys.shape)
        return MatrixMoments(keys, queries + erased, keys * queries, nothing, nothing[..., 0], erased)
