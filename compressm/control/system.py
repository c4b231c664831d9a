"""Diagonal discrete-time systems, frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressm.errors import NumericalError, bad_argument
from compressm.kernels import Gramians, gramians
from compressm.kernels.gramians.op import check_system

if TYPE_CHECKING:
    from compressm.control.balancing import Balanced
    from compressm.control.state_space import StateSpace

MIN_LOG_MODULUS = -700.0  # stands for an eigenvalue of zero: gone after one step in float64


@dataclass(frozen=True, eq=False)
class DiagonalSystem:
    """h_t = diag(lam) h_{t-1} + B u_t, y_t = C h_t, or y_t = Re(C h_t) in the real convention; batched over leading axes.

    The logarithms of the eigenvalues are kept, because 1 - |lam|^2 cannot be had from lam near the unit circle.

    Attributes:
        log_lam: (..., N) complex128, real part below zero.
        B: (..., N, H_in) complex128.
        C: (..., H_out, N) complex128.

    Raises:
        ArgumentError: shapes do not fit.
        NumericalError: NaN or infinite entries, or an eigenvalue on or outside the unit circle.
    """

    log_lam: Tensor
    B: Tensor
    C: Tensor

    def __post_init__(self) -> None:
        check_system(self.log_lam, self.B, self.C)
        for name in ("log_lam", "B", "C"):
            value = getattr(self, name).detach().to(torch.complex128)
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise NumericalError(f"{name}: {bad} of {value.numel()} entries are NaN or infinite, expected finite ones")
            object.__setattr__(self, name, value)
        if bool((self.log_lam.real >= 0).any()):
            largest = float(self.log_lam.real.max())
            raise NumericalError(
                f"log_lam: expected real parts below 0 (|lambda| < 1), got a largest one of {largest:.3g}. "
                "Keep the eigenvalues inside the unit circle"
            )

    @classmethod
    def from_lam(cls, lam: Tensor, B: Tensor, C: Tensor) -> DiagonalSystem:
        """From the eigenvalues themselves (..., N); prefer the logarithms where they are at hand."""
        lam = lam.to(torch.complex128)
        modulus = lam.abs().log().clamp(min=MIN_LOG_MODULUS)
        return cls(torch.complex(modulus, lam.angle()), B, C)

    @classmethod
    def from_state_space(
        cls, model: Any, B: Any = None, C: Any = None, *, step: float | None = None, method: str = "bilinear"
    ) -> DiagonalSystem:
        """From a real model x_{t+1} = A x_t + B u_t, y_t = C x_t, or x' = A x + B u; one mode for every conjugate pair.

        Gramians and Hankel singular values in the real convention are the model's (and further zeros).  Outputs come one step
        early, y_t = Re(C h_t) with h_t = x_{t+1}, and a feedthrough D is no part of the system: reductions leave it as it is.

        Args:
            model: A (n, n), a :class:`compressm.control.StateSpace`, or an object with ``A``, ``B``, ``C`` and ``dt`` such as
                scipy's and python-control's.
            B, C: (n, inputs) and (outputs, n) with a matrix A.
            step: samples continuous time at this step; None for discrete time.
            method: ``"bilinear"``, with B and C scaled such that Hankel singular values stay, or ``"zoh"``.

        Raises:
            ArgumentError: shapes do not fit, or a step is missing, or given for a model of discrete time.
            NumericalError: A is not diagonalisable, says how far from it, or not stable.
        """
        from compressm.control.state_space import diagonalised

        return diagonalised(model, B, C, step=step, method=method)

    def to_state_space(self) -> StateSpace:
        """The real model of 2N states [Re h; Im h] with these Gramians, in the timing of :meth:`from_state_space`; D is zero.

        Raises:
            ArgumentError: a batch of systems.
        """
        from compressm.control.state_space import state_space

        return state_space(self)

    @property
    def order(self) -> int:
        """Number of complex states N."""
        return self.log_lam.shape[-1]

    @property
    def batch_shape(self) -> torch.Size:
        """Leading axes that all three tensors broadcast to."""
        return torch.broadcast_shapes(self.log_lam.shape[:-1], self.B.shape[:-2], self.C.shape[:-2])

    def gramians(self) -> Gramians:
        """P, S, Q, S_Q, each (..., N, N) complex128; see :class:`compressm.kernels.Gramians`."""
        return gramians(self.log_lam, self.B, self.C)

    def hankel_singular_values(self, convention: str = "real") -> Tensor:
        """Descending float64, (..., 2N) for ``"real"`` and (..., N) for ``"complex"``."""
        return self._each(lambda system: _singular_values(system, convention))

    def truncate(self, rank: int, convention: str = "real") -> DiagonalSystem:
        """Balanced truncation to ``order == rank``.

        Raises:
            ArgumentError: rank is not between 1 and the order, or the convention is unknown.
        """
        if not self.batch_shape:
            return _balance(self, convention).reduce(rank).system
        reduced = [_balance(system, convention).reduce(rank).system for system in self.unbatched()]
        stacked = (torch.stack([getattr(s, name) for s in reduced]) for name in ("log_lam", "B", "C"))
        return DiagonalSystem(*(tensor.unflatten(0, self.batch_shape) for tensor in stacked))

    def error_bound(self, rank: int, convention: str = "real") -> Tensor:
        """(...) float64: twice the sum of the Hankel singular values that ``truncate(rank)`` cuts.

        It bounds the H-infinity norm of the error of balanced truncation (Enns 1984; Glover 1984).
        """

        def bound(system: DiagonalSystem) -> Tensor:
            balanced = _balance(system, convention)
            return 2 * balanced.hsv[balanced.reduce(rank).real_order :].sum()

        return self._each(bound)

    def impulse_response(self, steps: int) -> Tensor:
        """C diag(lam)^t B for t = 0 .. steps-1, (..., steps, H_out, H_in) complex128."""
        t = torch.arange(steps, dtype=torch.float64, device=self.log_lam.device)
        powers = torch.exp(self.log_lam[..., None, :] * t[:, None])
        return (self.C[..., None, :, :] * powers[..., None, :]) @ self.B[..., None, :, :]

    def frequency_response(self, omega: Tensor) -> Tensor:
        """C diag(1 / (1 - lam exp(-i omega))) B, (..., K, H_out, H_in) complex128.

        Args:
            omega: (K,) radians per step.
        """
        omega = omega.to(self.log_lam.device, torch.float64)
        shifted = torch.complex(
            self.log_lam.real[..., None, :].expand(*self.log_lam.shape[:-1], len(omega), -1),
            self.log_lam.imag[..., None, :] - omega[:, None],
        )
        resolvent = 1 / one_minus_exp(shifted)
        return (self.C[..., None, :, :] * resolvent[..., None, :]) @ self.B[..., None, :, :]

    def unbatched(self) -> list[DiagonalSystem]:
        """The systems of a batch, in the order of its flattened leading axes."""
        shape = self.batch_shape
        tensors = []
        for tensor, kept in ((self.log_lam, 1), (self.B, 2), (self.C, 2)):
            tail = tensor.shape[tensor.dim() - kept :]
            tensors.append(tensor.expand(*shape, *tail).reshape(-1, *tail))
        return [DiagonalSystem(*parts) for parts in zip(*tensors, strict=True)]

    def _each(self, function) -> Tensor:
        if not self.batch_shape:
            return function(self)
        return torch.stack([function(system) for system in self.unbatched()]).unflatten(0, self.batch_shape)


def one_minus_exp(z: Tensor) -> Tensor:
    """1 - exp(z) of complex z, accurate near zero."""
    decay, phase = z.real, z.imag
    e = decay.exp()
    return torch.complex(-torch.expm1(decay) + 2 * e * torch.sin(phase / 2) ** 2, -e * torch.sin(phase))


def _balance(system: DiagonalSystem, convention: str) -> Balanced:
    from compressm.control.balancing import balance

    return balance(system, convention)


def _singular_values(system: DiagonalSystem, convention: str) -> Tensor:
    from compressm.control.balancing import hankel_singular_values

    return hankel_singular_values(system, convention)


def check_single(system: DiagonalSystem) -> None:
    """Raise ArgumentError for a batch of systems."""
    if system.batch_shape:
        raise bad_argument("system", got=f"a batch {tuple(system.batch_shape)}", expected="one system without leading axes")
