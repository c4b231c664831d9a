"""What is alike in training what a cut leaves of a mixer with matrix-valued states, on what the mixer got and gave before.

Keys and queries alone change with the states that are left.  All else is computed once, and a step of training is what makes
keys and queries, the recurrence with few states, and what stands behind it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters._tokens import real_tokens
from compressm.adapters.base import Distiller, LayerEdit, TensorMap
from compressm.adapters.parameters import layer_input, precision
from compressm.layers._plain import plain

RATE, MAP_RATE = 4e-3, 2e-3  # Adam's first learning rates, of projections and taps, and of maps
WIDE = 64  # d_model from which on that of the projection falls like its weights, with the root
CHANNELS = 128  # of the mixer's output that a step looks at, others at every step


def projection_rate(weight: Tensor) -> float:
    """Of a projection's rows (rows, d_model)."""
    return RATE * float(min(1.0, (WIDE / weight.shape[1]) ** 0.5))


class MixerDistiller(Distiller):
    """The mixer around keys and queries, in float32; norm and output projection are called as they are.

    Args:
        module: the mixer as it is.
        edit: what it becomes.
        projection: name of its first projection.
        output: its last one.
        beside: how many of its inputs, the first ones, are none of the recurrence.
    """

    def __init__(self, module: Any, edit: LayerEdit, projection: str, output: nn.Module, beside: int = 0) -> None:
        self.module, self.edit, self.projection = module, edit, projection
        self.output, self.beside = output, beside
        self.trained: list[tuple[str, slice | Tensor, Tensor, Tensor]] = []

    @abstractmethod
    def around(self, hidden: Tensor, real: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """What stays as it is, by name, and what the output projection gets of the mixer as it is.

        Args:
            hidden: (sequences, steps, d_model).
            real: (sequences, steps) bool, where a token is no padding.
        """

    @abstractmethod
    def run(self, fixed: TensorMap) -> Tensor:
        """What the output projection gets of the new mixer, (sequences, steps, channels), differentiable in the leaves."""

    @cached_property
    def readout(self) -> Tensor | None:
        """The output projection's weights behind the recurrence; None where it is more than its parameters say."""
        if not plain(self.output, nn.Linear):
            return None
        weight: Any = self.output.weight
        return weight.detach()[:, self.beside :].float()

    def take(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        hidden = layer_input(module, args, kwargs, self.projection)
        return {"hidden": hidden, "real": real_tokens(kwargs, hidden)}

    @torch.no_grad()
    def prepare(self, calls: TensorMap) -> dict[str, Tensor]:
        fixed, y = self.around(calls["hidden"], calls["real"])
        return {**fixed, "real": calls["real"], "target": self._read(y, slice(None))}

    def loss(self, sequences: TensorMap, random: torch.Generator | None) -> tuple[Tensor, Tensor]:
        target, channels = sequences["target"], slice(None)
        if random is not None:
            blocks = -(-target.shape[-1] // CHANNELS)
            begin = CHANNELS * int(torch.randint(blocks, (1,), generator=random, device="cpu"))
            channels = slice(begin, begin + CHANNELS)
        target = target[..., channels]
        output = self._read(self.run(sequences), channels)
        real = sequences["real"][..., None]
        return ((output - target) * real).square().sum(), (target * real).square().sum()

    def deltas(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for key, rows, leaf, begun in self.trained:
            delta = found.setdefault(key, torch.zeros_like(self.edit.tensors[key], dtype=torch.float64))
            delta[rows] = leaf.detach().double() - begun.double()
        return found

    def train(self, key: str, rows: slice | Tensor = slice(None)) -> Any:
        """Rows of one of the edit's tensors as a leaf; None if there is no such tensor."""
        if key not in self.edit.tensors:
            return None
        begun = self.edit.tensors[key][rows].detach().float().clone()
        leaf = begun.clone().requires_grad_()
        self.trained.append((key, rows, leaf, begun))
        return leaf

    def _read(self, y: Tensor, channels: slice) -> Tensor:
        """What the output projection makes of it, some channels: the mixer's output but for what is the same in both."""
        if self.readout is not None:
            return F.linear(y, self.readout[channels])
        return self.output(F.pad(y, (self.beside, 0)).to(precision(self.output, y.dtype)))[..., channels].float()
