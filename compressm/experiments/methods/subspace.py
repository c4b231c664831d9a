"""A linear system found by least squares, without training: what control theory has for the same task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressm.adapters.diagonal import write
from compressm.adapters.lru import LRUAdapter
from compressm.control import DiagonalSystem, StateSpace, subspace_identification
from compressm.errors import DataError
from compressm.experiments.methods.base import Look
from compressm.experiments.methods.small import Small
from compressm.experiments.tasks.datasets.signals import Signals
from compressm.experiments.tasks.rates import Rate

if TYPE_CHECKING:
    from compressm.experiments.tasks.parts import BlockModel, Model
    from compressm.experiments.tasks.task import Task
    from compressm.layers import LRU

SEQUENCES = 256  # of the training data: more change little


class Subspace(Small):
    """As small as the compressed run ends; its one layer is the system that subspace identification finds, and stays it."""

    name = "subspace"
    title = "subspace identification"
    phrase = "the system found by least squares"
    look = Look("#8a6d1f", "#d6b656", line=(0, (2, 2)), marker="D", layer=2.3)

    def unfit(self, model: type[Model]) -> str:
        return "" if model.reads is Signals else f"identifies systems from signals, the model {model.name!r} reads others"

    def check(self, settings: Any, model: Model) -> None:
        super().check(settings, model)
        if settings.blocks != 1:
            raise ValueError(f"blocks = {settings.blocks} must be 1 for {self.name!r}, which finds one system")

    def rate(self, settings: Any) -> Rate:
        """Nothing is trained."""
        return lambda step: 0.0

    def start(self, task: Task, states: Sequence[int]) -> BlockModel:
        small, data = super().start(task, states), task.data
        assert isinstance(data, Signals)  # see unfit
        inputs, outputs = (signal[:SEQUENCES].cpu() for signal in (data.train_x, data.train_y))
        take_over(getattr(small.blocks[0], task.model.mixer), *identified(inputs, outputs, states[0]))
        return small


def identified(u: Tensor, y: Tensor, states: int) -> tuple[DiagonalSystem, Tensor]:
    """A system of as large an order as fits into so many complex states, and its skip.

    A model says y_t = C x_t + D u_t and a layer y_t = Re(c h_t) + d u_t with h_t = x_{t+1}: c = C A^-1 and d = D - C A^-1 B,
    of which a layer has the diagonal.

    Raises:
        DataError: none that is stable fits.
    """
    for order in range(2 * states, 0, -1):
        A, B, C, D = subspace_identification(u, y, order)
        eigenvalues = torch.linalg.eigvals(A)
        if int((eigenvalues.imag >= 0).sum()) <= states and float(eigenvalues.abs().max()) < 1:
            heard = torch.linalg.solve(A, C, left=False)
            found = DiagonalSystem.from_state_space(StateSpace(A, B, heard, torch.zeros_like(D)))
            return padded(found, states), (D - heard @ B).diagonal()
    raise DataError(f"no stable system of {states} states was found in the signals. Give more data, or a larger rank")


def padded(system: DiagonalSystem, states: int) -> DiagonalSystem:
    """The same with further states that nothing drives or hears, up to a number."""
    more = states - system.order
    pad = torch.nn.functional.pad
    log_lam = torch.cat([system.log_lam, system.log_lam.new_full((more,), -1.0)])
    return DiagonalSystem(log_lam, pad(system.B, (0, 0, 0, more)), pad(system.C, (0, more)))


@torch.no_grad()
def take_over(layer: LRU, system: DiagonalSystem, skip: Tensor) -> None:
    """Make a layer that system."""
    form, old = LRUAdapter().modes(layer)
    new, _ = write(form, old, system, real=True)
    for key, tensor in form.finite(new, "the identified system has").items():
        layer.get_parameter(key).copy_(tensor)
    layer.D.copy_(skip)
