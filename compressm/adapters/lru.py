"""Linear Recurrent Unit layers (parameters nu_log, theta_log, gamma_log, B_re, B_im, C_re, C_im)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compressm.adapters._diagonal_form import DiagonalForm, Modes, Scalars
from compressm.adapters.diagonal import MAX_LOG_DECAY, MIN_LOG_DECAY, DiagonalAdapter
from compressm.adapters.parameters import check_finite, label, plain_parameters, wide
from compressm.control import DiagonalSystem
from compressm.errors import NumericalError

NAMES = ("nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im")
MIN_PHASE = 1e-3  # smaller phases are written as theta + 2 pi: log(theta) and its gradient stay finite


class LRUForm(DiagonalForm):
    """log_lam = -exp(nu_log) + i exp(theta_log), beta = exp(gamma_log), kappa = 1; gamma = sqrt(1 - |lam|^2) in new modes."""

    scalars = ("nu_log", "theta_log", "gamma_log")
    free = ("nu_log", "theta_log")

    def coefficients(self, scalars: Scalars) -> tuple[Tensor, Tensor, Tensor]:
        gamma = scalars["gamma_log"].exp()
        return torch.complex(-scalars["nu_log"].exp(), scalars["theta_log"].exp()), gamma, torch.ones_like(gamma)

    def unpack(self, tensors: Mapping[str, Tensor], *, gradients: bool = False) -> Modes:
        b, c = (torch.complex(tensors[f"{letter}_re"], tensors[f"{letter}_im"]) for letter in "BC")
        return Modes({name: tensors[name] for name in self.scalars}, b, c)

    def pack(self, modes: Modes, *, gradients: bool = False) -> dict[str, Tensor]:
        b, c = modes.b, modes.c
        return {**modes.scalars, "B_re": b.real, "B_im": b.imag, "C_re": c.real, "C_im": c.imag}

    def solve(self, log_lam: Tensor, old: Modes, live: Scalars | None) -> dict[str, Tensor]:
        decay = (-log_lam.real).clamp(MIN_LOG_DECAY, MAX_LOG_DECAY)
        if live is None:
            theta = torch.remainder(log_lam.imag, 2 * math.pi)
            theta = torch.where(theta < MIN_PHASE, theta + 2 * math.pi, theta)
        else:
            theta = log_lam.imag.clamp(min=MIN_PHASE)
        gamma = torch.sqrt(-torch.expm1(-2 * decay))
        return {"nu_log": decay.log(), "theta_log": theta.log(), "gamma_log": gamma.log()}


class LRUAdapter(DiagonalAdapter):
    """Reads lam = exp(-exp(nu_log) + i exp(theta_log)), B = exp(gamma_log) (B_re + i B_im), C = C_re + i C_im.

    The skip D does not depend on the states and stays.  Edits choose the free scale of every mode: gamma = sqrt(1 -
    |lam|^2) as at initialisation, and in the real convention every row of B_re + i B_im gets the median row norm that
    the layer had, C taking the inverse factor (the complex convention keeps the scale of unit eigenvectors, as the
    CompreSSM authors' code does).
    """

    papers = ("orvieto2023resurrecting",)

    def form(self, module: nn.Module) -> LRUForm:
        return LRUForm()

    def axis(self, key: str) -> int:
        return 1 if key.startswith("C_") else 0

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
        nu_log = wide(parameters["nu_log"])
        unstable = (torch.exp(-nu_log.exp()) >= 1).nonzero().flatten()
        if len(unstable):
            index = int(unstable[0])
            raise NumericalError(
                f"{label(module, name)}: parameter nu_log[{index}] = {float(nu_log[index]):.6g} means "
                f"|lambda| = 1, expected |lambda| < 1 ({len(unstable)} such states). Clamp nu_log from below"
            )
        check_finite(module, {f"exp({k})": wide(parameters[k]).exp() for k in ("nu_log", "theta_log", "gamma_log")}, name)
        return super().read(module, name)
