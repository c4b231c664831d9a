"""Layers whose states a criterion for rows may choose, and the gradients that some of these want."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters.base import Adapter, Kind, Meter
from compressm.adapters.parameters import label, own_parameter
from compressm.control import RowCriterion
from compressm.errors import ModelError

Rows = Sequence[Tensor]  # of a parameter, (G, N) int64 each: those that make the keys or queries of group g, row n of its state


class RowRanked(Adapter[Kind]):
    """A layer with rows of states, G groups of N."""

    ranked_by = RowCriterion

    @abstractmethod
    def rows(self, module: nn.Module) -> Mapping[str, Rows]:
        """By name relative to the layer, which rows of its parameters make keys and queries."""

    def instrument(self, module: nn.Module, name: str, sequences: int, rows_per_state: int | None, seed: int) -> Meter:
        meter = self.meter(module, name, sequences, rows_per_state, seed)
        wanted = self.criterion is not None and self.criterion.wants_gradients
        return GradientMeter(meter, module, name, self.rows(module)) if wanted else meter


class GradientMeter(Meter):
    """Beside what another meter measures, the squares of w dL/dw over the weights that make a row's keys and queries.

    Args:
        meter: the other one; its result gets ``gradients``.
        module, name: the layer.
        rows: see :meth:`RowRanked.rows`.
    """

    def __init__(self, meter: Meter, module: nn.Module, name: str, rows: Mapping[str, Rows]) -> None:
        super().__init__()
        self.meter, self.rows = meter, rows
        weights = {key: own_parameter(module, key) for key in rows}
        frozen = [key for key, weight in weights.items() if not weight.requires_grad]
        if frozen:
            raise ModelError(
                f"{label(module, name)}: {', '.join(frozen)} is frozen, expected weights with requires_grad, as the criterion "
                "looks at their gradients. Choose another criterion"
            )
        first = next(iter(rows.values()))[0]
        self.sums = torch.zeros(first.shape, dtype=torch.float64, device=next(iter(weights.values())).device)
        self.felt = 0  # of the weights, how many gradients of this batch have come

    @property
    def reached(self) -> bool:
        return self.meter.reached

    def begin(self, seed: int) -> None:
        self.meter.begin(seed)
        self.felt = 0

    def merge(self, add: Callable[[Any], Any], join: Callable[[Tensor], Tensor]) -> None:
        self.meter.merge(add, join)
        self.sums = add(self.sums)

    def observe(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        self.meter.replaying = self.replaying
        if not self.replaying and not self.signals:  # a layer that runs twice has its weights once
            self.signals += [own_parameter(module, key) for key in self.rows]
        return self.meter.observe(module, args, kwargs, output)

    @torch.no_grad()
    def adjoint(self, grad: Tensor) -> None:
        """The gradients by the weights come in the order of ``rows``."""
        key = list(self.rows)[self.felt]
        product = (self.signals[self.felt].double() * grad.double()).square().flatten(1 if grad.dim() > 1 else 0)
        energy = product.sum(1) if product.dim() > 1 else product
        for rows in self.rows[key]:
            self.sums += energy[rows.to(energy.device)]
        self.felt += 1

    def result(self, name: str) -> Any:
        return replace(self.meter.result(name), gradients=self.sums)
