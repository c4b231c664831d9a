"""What compression needs to know about a layer, and the description of one edit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressm.control import DiagonalSystem, Reduction
from compressm.errors import ModelError, NumericalError

TensorMap = Mapping[str, Tensor]
Transport = Callable[[TensorMap], dict[str, Tensor]]


@dataclass(frozen=True)
class LayerEdit:
    """Everything that changes when one layer is reduced; describing it mutates nothing.

    The three functions take a mapping that holds one tensor for every name of ``tensors`` in the old shape and return
    float64 tensors in the new shape.

    Attributes:
        rank_before, rank_after: states before and after.
        tensors: parameter name (local to the layer) to its new value, in the parameter's dtype and device.
        first_moments: carries gradient-like state (Adam's ``exp_avg``, SGD's ``momentum_buffer``).
        second_moments: carries squared-gradient state (Adam's ``exp_avg_sq``).
        values: carries another copy of the parameters (an EMA) through the same change of basis.
    """

    rank_before: int
    rank_after: int
    tensors: dict[str, Tensor]
    first_moments: Transport
    second_moments: Transport
    values: Transport


class Adapter(ABC):
    """How one family of layers reads as a system, and which tensors change together.

    An adapter has no state and never mutates a module.
    """

    @abstractmethod
    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        """Local names of the parameters whose shape depends on the rank."""

    @abstractmethod
    def rank(self, module: nn.Module) -> int:
        """Number of states."""

    @abstractmethod
    def read(self, module: nn.Module, name: str = "") -> DiagonalSystem:
        """The layer as a system, float64.

        Args:
            module: the layer.
            name: its name in the model, for messages.

        Raises:
            NumericalError: a parameter is NaN or infinite, or an eigenvalue is not inside the unit circle.
            ModelError: a parameter is not a plain parameter (parametrized, missing).
        """

    @abstractmethod
    def edit(self, module: nn.Module, reduction: Reduction) -> LayerEdit:
        """Describe how the layer becomes the reduced system."""

    @abstractmethod
    def blank(self, module: nn.Module, rank: int) -> dict[str, Tensor]:
        """Zero tensors in the shapes of ``rank`` states, dtype and device of the module's parameters."""

    @abstractmethod
    def layer_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The driving signal (batch, L, H) real and the initial state (batch, N) complex or None of one call."""

    @abstractmethod
    def layer_output(self, output: Any) -> Tensor:
        """The output signal (batch, L, H_out) in what the module's forward returned."""

    @abstractmethod
    def with_output(self, output: Any, signal: Tensor) -> Any:
        """``output`` with its output signal replaced by ``signal``."""

    def kernel_plan(self, module: nn.Module) -> str:
        """Which kernel runs the layer now, in one line; empty before the first forward pass."""
        plan = getattr(module, "kernel_plan", None)
        return "" if plan is None else str(plan)


def plain_parameters(module: nn.Module, names: tuple[str, ...], name: str = "") -> dict[str, nn.Parameter]:
    """The named parameters of a module.

    Raises:
        ModelError: one is missing or computed (``torch.nn.utils.parametrize``, pruning).
    """
    found: dict[str, nn.Parameter] = {}
    for key in names:
        parameter = module._parameters.get(key)
        if parameter is None:
            raise ModelError(
                f"{label(module, name)}: {key} is not a plain parameter. Remove parametrizations and pruning masks "
                "(torch.nn.utils.parametrize.remove_parametrizations) before compressing"
            )
        found[key] = parameter
    return found


def check_finite(module: nn.Module, parameters: Mapping[str, Tensor], name: str = "") -> None:
    """Raise NumericalError naming the first parameter that holds a NaN or an infinity."""
    for key, parameter in parameters.items():
        bad = int((~torch.isfinite(parameter.detach())).sum())
        if bad:
            raise NumericalError(
                f"{label(module, name)}: parameter {key} holds {bad} NaN or infinite of {parameter.numel()} values, "
                "expected finite ones. Training has diverged: go back to an earlier checkpoint or lower the learning rate"
            )


def label(module: nn.Module, name: str = "") -> str:
    """How messages call a layer."""
    kind = type(module).__name__
    return f"layer {name!r} ({kind})" if name else f"layer of type {kind}"
