"""Families of layers as parametrisations of one thing: a diagonal system, mode by mode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compressm.errors import NumericalError

Scalars = Mapping[str, Tensor]


@dataclass(frozen=True)
class Modes:
    """A layer's parameters, or tensors like them, by modes; float64 and complex128.

    Gradients of complex numbers are re + i im of those by the real and the imaginary part, and squares likewise.

    Attributes:
        scalars: by name, (..., N) real: what eigenvalues and gains are made of.
        b: (..., N, H_in) complex.
        c: (..., H_out, N) complex.
    """

    scalars: Scalars
    b: Tensor
    c: Tensor


@dataclass(frozen=True)
class Coefficients:
    """The system (log_lam, diag(beta) b, c diag(kappa)) that modes stand for.

    Attributes:
        log_lam, beta, kappa: (..., N) complex128.
    """

    log_lam: Tensor
    beta: Tensor
    kappa: Tensor


@dataclass(frozen=True)
class Slopes:
    """How log_lam and the logarithms of beta and kappa change with each scalar, (..., N) complex128 by the scalar's name."""

    log_lam: Scalars
    beta: Scalars
    kappa: Scalars


class DiagonalForm(ABC):
    """How a family writes a diagonal system.

    Attributes:
        scalars: names of the real numbers that every mode has.
        free: two of them that set log_lam while the others are held: what a gradient by log_lam is read from.
    """

    scalars: tuple[str, ...]
    free: tuple[str, str]

    @abstractmethod
    def coefficients(self, scalars: Scalars) -> tuple[Tensor, Tensor, Tensor]:
        """log_lam, beta and kappa, complex, of real scalars of any one shape; differentiable, entry by entry."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], *, gradients: bool = False) -> Modes:
        """The modes of a layer's parameters, or of gradients or squares of them."""

    @abstractmethod
    def pack(self, modes: Modes, *, gradients: bool = False) -> dict[str, Tensor]:
        """The inverse of :meth:`unpack`, for the parameters that change with the rank."""

    @abstractmethod
    def solve(self, log_lam: Tensor, old: Modes, live: Scalars | None) -> dict[str, Tensor]:
        """Scalars of new modes (..., r) with given eigenvalues.

        Args:
            log_lam: (..., r) complex128.
            old: the layer before.
            live: scalars of the reduced layer where another copy of it is written, else None.
        """

    def evaluate(self, scalars: Scalars) -> Coefficients:
        """:meth:`coefficients` of float64 scalars."""
        return Coefficients(*(part.to(torch.complex128) for part in self.coefficients(scalars)))

    def slopes(self, scalars: Scalars) -> Slopes:
        """The Jacobian of :meth:`coefficients`, by ``torch.func``."""
        shape = next(iter(scalars.values())).shape
        stacked = torch.stack([scalars[name].reshape(-1) for name in self.scalars], -1)

        def planar(values: Tensor) -> Tensor:
            parts = self.coefficients(dict(zip(self.scalars, values.unbind(), strict=True)))
            return torch.cat([torch.view_as_real(part.to(torch.complex128).resolve_conj()) for part in parts])

        jacobian = torch.func.vmap(torch.func.jacrev(planar))(stacked)  # (modes, 6, scalars)
        columns = torch.complex(jacobian[:, 0::2], jacobian[:, 1::2])  # (modes, 3, scalars)
        value = self.evaluate(scalars)
        slopes = []
        for row, scale in enumerate((None, value.beta, value.kappa)):
            found = {name: columns[:, row, k].reshape(shape) for k, name in enumerate(self.scalars)}
            slopes.append(found if scale is None else {name: slope / scale for name, slope in found.items()})
        return Slopes(*slopes)

    def scale(self, b: Tensor, old: Modes, real: bool) -> Tensor:
        """(..., r) by which rows b / beta of a reduced system are divided and columns of C multiplied.

        By default, in the real convention, the factor that gives every row the median norm of the old rows; the complex one
        keeps the scale of unit eigenvectors, as the CompreSSM authors' code does.
        """
        norm = torch.linalg.vector_norm(b, dim=-1)
        scale = torch.ones_like(norm)
        if real:
            target = torch.linalg.vector_norm(old.b, dim=-1).median(-1, keepdim=True).values
            scale = torch.where((norm > 0) & (target > 0), norm / target, scale)
        return scale

    def finite(self, modes: Modes, what: str) -> dict[str, Tensor]:
        """The packed modes.

        Raises:
            NumericalError: ``what`` has NaN or infinite values.
        """
        packed = self.pack(modes)
        bad = [key for key, tensor in packed.items() if not bool(torch.isfinite(tensor).all())]
        if bad:
            raise NumericalError(f"{what} NaN or infinite {', '.join(bad)}, expected finite values")
        return {key: tensor.contiguous() for key, tensor in packed.items()}
