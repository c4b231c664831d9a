"""Linear Recurrent Unit layers (parameters nu_log, theta_log, gamma_log, B_re, B_im, C_re, C_im)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters._lru_transport import LRUTransport
from compressm.adapters.base import LayerEdit, check_finite, label, plain_parameters
from compressm.adapters.lti import LTIAdapter
from compressm.control import DiagonalSystem, Reduction
from compressm.errors import ModelError, NumericalError

NAMES = ("nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im")
MIN_PHASE = 1e-3  # smaller phases are written as theta + 2 pi: log(theta) and its gradient stay finite
MIN_LOG_DECAY = 1e-12
MAX_LOG_DECAY = 40.0  # |lambda| = 4e-18: gone after one step in any precision


class LRUAdapter(LTIAdapter):
    """Reads lam = exp(-exp(nu_log) + i exp(theta_log)), B = exp(gamma_log) (B_re + i B_im), C = C_re + i C_im.

    The skip D does not depend on the states and stays.  Edits choose the free scale of every mode: gamma = sqrt(1 -
    |lam|^2) as at initialisation, and in the real convention every row of B_re + i B_im gets the median row norm that
    the layer had, C taking the inverse factor (the complex convention keeps the scale of unit eigenvectors, as the
    CompreSSM authors' code does).
    """

    papers = ("orvieto2023resurrecting",)

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        return NAMES

    def independent(self, module: nn.Module) -> tuple[str, ...]:
        return ("D",)

    def reads(self, module: nn.Module) -> tuple[str, ...]:
        return NAMES

    def rank(self, module: nn.Module) -> int:
        return plain_parameters(module, ("nu_log",))["nu_log"].shape[0]

    def state_bytes(self, module: nn.Module, rank: int) -> int:
        """A complex number a state: 8 bytes, or 16 for float64 parameters."""
        dtype = plain_parameters(module, ("nu_log",))["nu_log"].dtype
        return rank * torch.promote_types(dtype, torch.float32).to_complex().itemsize

    @torch.no_grad()
    def read(self, module: nn.Module, name: str = "") -> DiagonalSystem:
        parameters = plain_parameters(module, NAMES, name)
        check_finite(module, parameters, name)
        value = {key: parameter.detach().double() for key, parameter in parameters.items()}
        decay = value["nu_log"].exp()
        unstable = (torch.exp(-decay) >= 1).nonzero().flatten()
        if len(unstable):
            index = int(unstable[0])
            raise NumericalError(
                f"{label(module, name)}: parameter nu_log[{index}] = {float(value['nu_log'][index]):.6g} means "
                f"|lambda| = 1, expected |lambda| < 1 ({len(unstable)} such states). Clamp nu_log from below"
            )
        check_finite(module, {f"exp({k})": value[k].exp() for k in ("nu_log", "theta_log", "gamma_log")}, name)
        B = value["gamma_log"].exp()[:, None] * torch.complex(value["B_re"], value["B_im"])
        C = torch.complex(value["C_re"], value["C_im"])
        return DiagonalSystem(torch.complex(-decay, value["theta_log"].exp()), B, C)

    @torch.no_grad()
    def edit(self, module: nn.Module, reduction: Reduction) -> LayerEdit:
        parameters = plain_parameters(module, NAMES)
        old = {key: parameter.detach().double() for key, parameter in parameters.items()}
        new, scale = to_parameters(reduction, old)
        transport = LRUTransport(old, new, reduction, scale)
        tensors = {key: tensor.to(parameters[key]) for key, tensor in new.items()}
        return LayerEdit(
            rank_before=old["nu_log"].shape[0],
            rank_after=new["nu_log"].shape[0],
            tensors=tensors,
            first_moments=transport.first_moments,
            second_moments=transport.second_moments,
            values=transport.values,
        )

    def blank(self, module: nn.Module, rank: int) -> dict[str, Tensor]:
        blank = {}
        for key, parameter in plain_parameters(module, NAMES).items():
            shape = list(parameter.shape)
            shape[1 if key.startswith("C_") else 0] = rank
            blank[key] = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        return blank

    def layer_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        u = args[0] if args else kwargs.get("x")
        state = args[1] if len(args) > 1 else kwargs.get("initial_state")
        if not isinstance(u, Tensor):
            raise ModelError(f"LRU was called with {type(u).__name__} as input, expected a tensor (batch, length, H)")
        return u, state

    def layer_output(self, output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    def with_output(self, output: Any, signal: Tensor) -> Any:
        return (signal, *output[1:]) if isinstance(output, tuple) else signal


def to_parameters(reduction: Reduction, old: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Float64 parameters of a reduced system, and the scale d of every mode: B_hat was divided by d, C multiplied.

    Args:
        reduction: from ``Balanced.reduce``.
        old: float64 parameters of the layer before, for the median row norm of B.

    Raises:
        NumericalError: the reduced system is not finite.
    """
    system = reduction.system
    device = old["nu_log"].device
    log_lam, B, C = system.log_lam.to(device), system.B.to(device), system.C.to(device)
    decay = (-log_lam.real).clamp(MIN_LOG_DECAY, MAX_LOG_DECAY)
    theta = torch.remainder(log_lam.imag, 2 * math.pi)
    theta = torch.where(theta < MIN_PHASE, theta + 2 * math.pi, theta)
    gamma = torch.sqrt(-torch.expm1(-2 * decay))
    B_hat = B / gamma[:, None]
    scale = torch.ones_like(decay)
    if is_real(reduction, old):
        norm = torch.linalg.vector_norm(B_hat, dim=1)
        target = torch.linalg.vector_norm(torch.complex(old["B_re"], old["B_im"]), dim=1).median()
        scale = torch.where((norm > 0) & (target > 0), norm / target, scale)
    B_hat, C = B_hat / scale[:, None], C * scale[None, :]
    new = {
        "nu_log": decay.log(), "theta_log": theta.log(), "gamma_log": gamma.log(),
        "B_re": B_hat.real, "B_im": B_hat.imag, "C_re": C.real, "C_im": C.imag,
    }  # fmt: skip
    bad = [key for key, tensor in new.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise NumericalError(f"the reduced system has NaN or infinite {', '.join(bad)}, expected finite values")
    return {key: tensor.contiguous() for key, tensor in new.items()}, scale


def is_real(reduction: Reduction, old: dict[str, Tensor]) -> bool:
    """Whether the reduction's bases live in the 2N real coordinates [Re x; Im x]."""
    return reduction.right.shape[0] == 2 * old["nu_log"].shape[0]
