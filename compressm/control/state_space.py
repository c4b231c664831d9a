"""Real state-space models in and out of diagonal form, and their reduction by truncation and by singular perturbation.

A model x_{t+1} = A x_t + B u_t, y_t = C x_t + D u_t and a diagonal system h_t = diag(lam) h_{t-1} + B u_t, y_t = Re(C h_t) have
the same Gramians and Hankel singular values where h_t = x_{t+1}: the diagonal system says C x one step earlier, and D is no
part of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from compressm.control.balancing import Balanced, balance
from compressm.control.coordinates import Coordinates
from compressm.control.system import MIN_LOG_MODULUS, DiagonalSystem, check_single, one_minus_exp
from compressm.errors import NumericalError, bad_argument, check_integer

MAX_CONDITION = 1e8  # of A's eigenvectors: half of the digits are left
METHODS = ("bilinear", "zoh")


class StateSpace(NamedTuple):
    """x_{t+1} = A x_t + B u_t, y_t = C x_t + D u_t; float64.

    Balancing leaves a feedthrough alone: add a model's D to that of its reduction.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor

    def arrays(self) -> tuple[np.ndarray, ...]:
        """(A, B, C, D) as numpy arrays, which ``scipy.signal.StateSpace`` and ``control.ss`` take, with the caller's ``dt``."""
        return tuple(matrix.cpu().numpy() for matrix in self)

    def frequency_response(self, omega: Tensor) -> Tensor:
        """D + C (exp(i omega) - A)^{-1} B, (K, H_out, H_in) complex128, at omega (K,) radians per step."""
        A, B, C, D = (matrix.to(torch.complex128) for matrix in self)
        z = torch.exp(1j * omega.to(A.device, torch.float64))[:, None, None]
        eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
        return D + C @ torch.linalg.solve(z * eye - A, B.expand(len(omega), -1, -1))


def diagonalised(
    model: Any, B: Any = None, C: Any = None, *, step: float | None = None, method: str = "bilinear"
) -> DiagonalSystem:
    """See :meth:`compressm.control.DiagonalSystem.from_state_space`."""
    A, B, C, _ = _matrices(model, B, C, None, step, method)
    eigenvalues, vectors = torch.linalg.eig(A)
    condition = float(torch.linalg.cond(vectors))
    if not condition <= MAX_CONDITION:
        raise NumericalError(
            f"A: its eigenvectors have condition {condition:.2g}, expected at most {MAX_CONDITION:.0g}: it is not "
            "diagonalisable, or so nearly not that half of the digits would be lost. Perturb it, or reduce it in its own form"
        )
    keep = eigenvalues.imag >= 0
    weight = torch.where(eigenvalues.imag > 0, 2.0, 1.0)  # one mode stands for a conjugate pair
    b = torch.linalg.solve(vectors, B.to(vectors))[keep]
    c = (C.to(vectors) @ vectors * weight)[:, keep]
    if step is None:
        return DiagonalSystem.from_lam(eigenvalues[keep], b, c)
    return _sampled(eigenvalues[keep], b, c, step, method)


def sampled(
    model: Any, B: Any = None, C: Any = None, D: Any = None, *, step: float, method: str = "bilinear"
) -> StateSpace:
    """A model of continuous time in discrete time, its D included.

    Args:
        model, B, C, step, method: as for :meth:`compressm.control.DiagonalSystem.from_state_space`, which takes the result.
        D: (outputs, inputs); None: zero, or the model's.

    Raises:
        ArgumentError: shapes do not fit, or the model's time is discrete.
    """
    A, B, C, D = _matrices(model, B, C, D, step, method)
    n, eye = len(A), torch.eye(len(A), dtype=A.dtype, device=A.device)
    if method == "bilinear":
        AB = torch.linalg.solve(eye - step / 2 * A, torch.cat([eye + step / 2 * A, step**0.5 * B], 1))
        Cd = torch.linalg.solve(eye - step / 2 * A, C, left=False) * step**0.5
        return StateSpace(AB[:, :n], AB[:, n:], Cd, D + step**0.5 / 2 * C @ AB[:, n:])
    held = torch.linalg.matrix_exp(step * torch.nn.functional.pad(torch.cat([A, B], 1), (0, 0, 0, B.shape[1])))
    return StateSpace(held[:n, :n], held[:n, n:], C, D)


def _matrices(model: Any, B: Any, C: Any, D: Any, step: float | None, method: str) -> StateSpace:
    """Checked float64 matrices of a model, or of the object that has them."""
    A = model
    if B is None and C is None and all(hasattr(model, name) for name in "ABC"):
        A, B, C, D = model.A, model.B, model.C, getattr(model, "D", None) if D is None else D
        dt = True if isinstance(model, StateSpace) else getattr(model, "dt", None)
        continuous = dt is None or (dt is not True and dt == 0)
        if continuous != (step is not None):
            expected = "the step to sample a model of continuous time at" if continuous else "None: its time is discrete"
            raise bad_argument("step", got=step, expected=expected)
    A, B, C = (_matrix(name, value) for name, value in (("A", A), ("B", B), ("C", C)))
    n, shape = A.shape[0], (C.shape[0], B.shape[1])
    D = A.new_zeros(shape) if D is None else _matrix("D", D)
    if A.shape != (n, n) or B.shape[0] != n or C.shape[1] != n or D.shape != shape:
        got = ", ".join(str(tuple(matrix.shape)) for matrix in (A, B, C, D))
        raise bad_argument("A, B, C, D", got=got, expected="(n, n), (n, inputs), (outputs, n) and (outputs, inputs)")
    if step is not None and not step > 0:
        raise bad_argument("step", got=step, expected="a positive number, or None for a model of discrete time")
    if method not in METHODS:
        raise bad_argument("method", got=repr(method), expected=" or ".join(map(repr, METHODS)))
    return StateSpace(A, B, C, D)


def _sampled(poles: Tensor, b: Tensor, c: Tensor, step: float, method: str) -> DiagonalSystem:
    """Modes of continuous time in discrete time."""
    if bool((poles.real >= 0).any()):
        raise NumericalError(
            f"A: expected eigenvalues with negative real parts, got a largest one of {float(poles.real.max()):.3g}. "
            "Only stable models have Gramians"
        )
    z = step * poles
    if method == "zoh":
        return DiagonalSystem(z, (-one_minus_exp(z) / poles)[:, None] * b, c)
    half = z / 2
    modulus = torch.log1p(4 * half.real / ((1 - half.real) ** 2 + half.imag**2)) / 2
    log_lam = torch.complex(modulus.clamp(min=MIN_LOG_MODULUS), ((1 + half) / (1 - half)).angle())
    gain = step**0.5 / (1 - half)
    return DiagonalSystem(log_lam, gain[:, None] * b, c * gain)


def _matrix(name: str, value: Any) -> Tensor:
    try:
        matrix = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))  # lists in float64
    except (TypeError, ValueError, RuntimeError) as error:
        raise bad_argument(name, got=type(value).__name__, expected="a real matrix") from error
    if matrix.dim() != 2 or matrix.is_complex():
        raise bad_argument(name, got=f"{tuple(matrix.shape)} of {matrix.dtype}", expected="a real matrix")
    matrix = matrix.to(torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        raise NumericalError(f"{name} holds NaN or infinite entries, expected finite ones")
    return matrix


def state_space(system: DiagonalSystem) -> StateSpace:
    """See :meth:`compressm.control.DiagonalSystem.to_state_space`."""
    check_single(system)
    at = Coordinates.of(system, "real")
    return StateSpace(at.A, at.B, at.C, at.C.new_zeros(at.C.shape[0], at.B.shape[1]))


def truncation(balanced: Balanced | DiagonalSystem, order: int) -> StateSpace:
    """Balanced truncation to ``order`` real states, in balanced coordinates; D is zero.

    Args:
        balanced: a system, or one balanced with Gramians of its own, in the real convention.
        order: states to keep.

    Raises:
        ArgumentError: there are no ``order`` balanced states, or the convention is not the real one.
    """
    A, B, C, _ = _blocks(balanced, order)
    return StateSpace(A[0][0], B[0], C[0], C[0].new_zeros(C[0].shape[0], B[0].shape[1]))


def singular_perturbation(balanced: Balanced | DiagonalSystem, order: int) -> StateSpace:
    """Balanced states beyond ``order`` follow the kept ones at once (Liu and Anderson 1989): no error at frequency zero.

    The kept Hankel singular values and the bound of twice the sum of the others are those of :func:`truncation`; the error is
    small at low frequencies, where truncation's is at high ones.  The reduced model has a D of all inputs and outputs, which
    the layers of this package have not.

    Args, Raises:
        as :func:`truncation`.
    """
    A, B, C, rest = _blocks(balanced, order)
    eye = torch.eye(rest, dtype=A[0][0].dtype, device=A[0][0].device)
    of_state, of_input = torch.linalg.solve(eye - A[1][1], torch.cat([A[1][0], B[1]], 1)).split([order, B[0].shape[1]], 1)
    return StateSpace(A[0][0] + A[0][1] @ of_state, B[0] + A[0][1] @ of_input, C[0] + C[1] @ of_state, C[1] @ of_input)


def _blocks(balanced: Balanced | DiagonalSystem, order: int) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor], int]:
    """A, B and C in balanced coordinates, cut behind ``order`` states, and how many there are behind."""
    if isinstance(balanced, DiagonalSystem):
        balanced = balance(balanced)
    if balanced.convention != "real":
        raise bad_argument("balanced", got=f"convention {balanced.convention!r}", expected="the real convention")
    at, (left, right) = Coordinates.of(balanced.system, "real"), balanced.bases
    total = right.shape[1]
    check_integer("order", order, 1, total, expected=f"an integer from 1 to {total}, the states that can be balanced")
    sizes = [order, total - order]
    A = [list(row.split(sizes, 1)) for row in (left @ at.A @ right).split(sizes)]
    return A, list((left @ at.B).split(sizes)), list((at.C @ right).split(sizes, 1)), sizes[1]
