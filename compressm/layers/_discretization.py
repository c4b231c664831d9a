"""From continuous time to discrete time, mode by mode.

x' = Lambda x + B u becomes x_t = exp(log_lam) x_{t-1} + gain B u_t.  The logarithm of the eigenvalue is formed without the
eigenvalue itself, so that 1 - |lam| keeps its digits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

Discretization = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def expm1(z: Tensor) -> Tensor:
    """exp(z) - 1 of complex z, accurate near zero."""
    x, y = z.real, z.imag
    return torch.complex(torch.expm1(x) * y.cos() - 2 * (y / 2).sin().square(), x.exp() * y.sin())


def zoh(Lambda: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Zero-order hold: log_lam = step Lambda, gain = (exp(step Lambda) - 1) / Lambda; step where Lambda is zero."""
    log_lam = step * Lambda
    still = Lambda == 0
    return log_lam, torch.where(still, step.to(log_lam.dtype), expm1(log_lam) / torch.where(still, 1.0, Lambda))


def bilinear(Lambda: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Tustin's rule: lam = (1 + z) / (1 - z) and gain = step / (1 - z), z = step Lambda / 2."""
    z = step * Lambda / 2
    decay = torch.log1p(4 * z.real / ((1 - z.real).square() + z.imag.square())) / 2
    phase = torch.atan2(2 * z.imag, 1 - z.real.square() - z.imag.square())
    return torch.complex(decay, phase), step / (1 - z)


DISCRETIZATIONS: Mapping[str, Discretization] = MappingProxyType({"zoh": zoh, "bilinear": bilinear})


def continuous(log_lam: Tensor, step: Tensor, discretization: str) -> Tensor:
    """Lambda of given eigenvalues in discrete time; the inverse of the above."""
    if discretization == "zoh":
        return log_lam / step
    return 2 / step * torch.tanh(log_lam / 2)
