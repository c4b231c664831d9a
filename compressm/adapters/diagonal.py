"""Layers whose parameters are a diagonal system, mode by mode: reading one, and writing a reduced one back."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters._diagonal_form import DiagonalForm, Modes
from compressm.adapters._diagonal_transport import DiagonalTransport
from compressm.adapters.base import LayerEdit
from compressm.adapters.lti import LTIAdapter
from compressm.adapters.parameters import check_finite, label, plain_parameters, wide
from compressm.control import DiagonalSystem, Reduction
from compressm.errors import ModelError, NumericalError

MIN_LOG_DECAY = 1e-12
MAX_LOG_DECAY = 40.0  # |lambda| = 4e-18: gone after one step in any precision


class DiagonalAdapter(LTIAdapter):
    """Adapter of layers with a :class:`DiagonalForm`; edits choose the free scale of every mode as the form says."""

    decay: str  # the parameter that keeps the eigenvalues inside the unit circle, for messages
    prefix = ""  # of the parameters' names

    @abstractmethod
    def form(self, module: nn.Module) -> DiagonalForm:
        """How the layer's parameters write a system."""

    @abstractmethod
    def axis(self, key: str) -> int:
        """The axis of a parameter that counts the states."""

    def copies(self, module: nn.Module, key: str) -> int:
        """How often that axis goes through the states."""
        return 1

    def modes(self, module: nn.Module, name: str = "") -> tuple[DiagonalForm, Modes]:
        """The layer's parameters, float64, by modes.

        Raises:
            NumericalError, ModelError: see :meth:`read`.
        """
        names = self.reads(module)
        parameters = plain_parameters(module, names, name)
        check_finite(module, parameters, name)
        form = self.form(module)
        return form, form.unpack({key: wide(parameter) for key, parameter in parameters.items()})

    @torch.no_grad()
    def read(self, module: nn.Module, name: str = "") -> DiagonalSystem:
        form, modes = self.modes(module, name)
        value = form.evaluate(modes.scalars)
        unstable = (value.log_lam.real.exp() >= 1).nonzero()
        if len(unstable):
            index = ", ".join(map(str, unstable[0].tolist()))
            raise NumericalError(
                f"{label(module, name)}: parameter {self.decay}[{index}] means |lambda| >= 1, expected |lambda| < 1 "
                f"({len(unstable)} such states). Keep it from getting there in training"
            )
        return DiagonalSystem(value.log_lam, value.beta[..., None] * modes.b, modes.c * value.kappa[..., None, :])

    @torch.no_grad()
    def edit(self, module: nn.Module, reduction: Reduction) -> LayerEdit:
        parameters = plain_parameters(module, self.parameters(module))
        form, old = self.modes(module)
        system, right, left, multiplicity = self.bases(reduction)
        like = old.b
        right, left, multiplicity = right.to(like), left.to(like), multiplicity.to(like.real)
        new, scale = write(form, old, system, real=right.shape[-2] == 2 * like.shape[-2])
        tensors = form.finite(new, "the reduced system has")
        transport = DiagonalTransport(form, old, new, right * scale[..., None, :], left / scale[..., None], multiplicity)
        return LayerEdit(
            rank_before=like.shape[-2],
            rank_after=new.b.shape[-2],
            tensors={key: tensor.to(parameters[key]) for key, tensor in tensors.items()},
            first_moments=transport.first_moments,
            second_moments=transport.second_moments,
            values=transport.values,
        )

    def bases(self, reduction: Any) -> tuple[DiagonalSystem, Tensor, Tensor, Tensor]:
        """The reduced system, right (..., n, r), left (..., r, n) and multiplicity (..., r)."""
        return reduction.system, reduction.right, reduction.left, reduction.multiplicity

    def blank(self, module: nn.Module, rank: int) -> dict[str, Tensor]:
        blank = {}
        for key, parameter in plain_parameters(module, self.parameters(module)).items():
            shape = list(parameter.shape)
            shape[self.axis(key)] = rank * self.copies(module, key)
            blank[key] = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        return blank

    def layer_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        u = args[0] if args else kwargs.get("x")
        state = args[1] if len(args) > 1 else kwargs.get("initial_state")
        return tensor_input(u), state

    def layer_output(self, output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    def with_output(self, output: Any, signal: Tensor) -> Any:
        return (signal, *output[1:]) if isinstance(output, tuple) else signal


def tensor_input(u: Any) -> Tensor:
    """The driving signal of a layer's call.

    Raises:
        ModelError: it is no tensor.
    """
    if not isinstance(u, Tensor):
        raise ModelError(f"a layer was called with {type(u).__name__} as input, expected a tensor (batch, length, H)")
    return u


def write(form: DiagonalForm, old: Modes, system: DiagonalSystem, *, real: bool) -> tuple[Modes, Tensor]:
    """The modes of a reduced system, and the scale of each: rows of b were divided by it, columns of c multiplied."""
    log_lam, B, C = (part.to(old.b.device) for part in (system.log_lam, system.B, system.C))
    log_lam = torch.complex(log_lam.real.clamp(-MAX_LOG_DECAY, -MIN_LOG_DECAY), log_lam.imag)
    scalars = form.solve(log_lam, old, None)
    value = form.evaluate(scalars)
    b = B / value.beta[..., None]
    scale = form.scale(b, old, real)
    return Modes(scalars, b / scale[..., None], C * scale[..., None, :] / value.kappa[..., None, :]), scale
