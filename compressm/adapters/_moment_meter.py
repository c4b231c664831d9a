"""Second moments of what layers with matrix-valued states are given on calibration data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters._tokens import real_tokens
from compressm.adapters.base import Meter
from compressm.adapters.parameters import layer_input
from compressm.control import MatrixMoments
from compressm.errors import NumericalError


class MomentMeter(Meter):
    """E[x x^T] over all tokens of several vectors x that every group of states gets.

    Args:
        groups, order: G and N of the recurrence.
        projection: name of the first projection, whose precision the input takes.
        device: where moments are summed.

    Attributes:
        letters: how messages call the moments.
    """

    letters: tuple[str, ...] = ("E[k k^T]", "E[q q^T]")

    def __init__(self, groups: int, order: int, projection: str, device: torch.device) -> None:
        super().__init__()
        self.projection = projection
        self.sums = torch.zeros(len(self.letters), groups, order, order, dtype=torch.float64, device=device)
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
        self.tokens += int(real.sum())
        for total, part in zip(self.sums, self.vectors(module, hidden, kwargs), strict=True):
            rows = part[real].transpose(0, 1).flatten(1, -2).to(torch.promote_types(part.dtype, torch.float32))
            total += (rows.mT @ rows).double()

    @abstractmethod
    def vectors(self, module: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Of hidden states (batch, L, d_model), the vectors (batch, L, G, ..., N), one for each of :attr:`letters`."""

    def result(self, name: str) -> MatrixMoments:
        moments = self.sums / self.tokens
        check_moments(dict(zip(self.letters, moments, strict=True)), name)
        return self.moments(*moments)

    def moments(self, keys: Tensor, queries: Tensor, *others: Tensor) -> MatrixMoments:
        """What the moments of :attr:`letters` are to a reduction."""
        nothing = keys.new_zeros(0, *keys.shape)
        return MatrixMoments(keys, queries, keys * queries, nothing, nothing[..., 0])


def check_moments(moments: Mapping[str, Tensor], name: str) -> None:
    """Raise NumericalError unless all are finite; ``name`` is the layer's."""
    for letters, matrix in moments.items():
        if not bool(torch.isfinite(matrix).all()):
            raise NumericalError(
                f"calibration: {letters} of layer {name!r} is not finite, expected finite keys, queries and states on the "
                "calibration data. Look for NaN or infinity in the batches"
            )
