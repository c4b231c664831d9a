"""Gramians that look at a part of the behaviour: the first steps, or a band of frequencies.

They are P and Q for :func:`compressm.control.balance`; twice the sum of the singular values that are cut is then no bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.control.coordinates import Coordinates, real_gramian, real_gramians
from compressm.control.system import DiagonalSystem, check_single
from compressm.errors import bad_argument, check_integer
from compressm.kernels.gramians.reference import denominators

DOUBLINGS = 60


def time_limited_gramians(system: DiagonalSystem, steps: int) -> tuple[Tensor, Tensor]:
    """P and Q, (..., 2N, 2N) float64 in coordinates [Re x; Im x], of the first ``steps`` steps of the impulse response.

    P = sum_{t < steps} A^t B B^T A^t^T and Q likewise (Gawronski and Juang 1990).  They do not promise a stable
    truncation: balance with ``fallback_Q``.

    Args:
        system: the system.
        steps: at least 1.

    Raises:
        ArgumentError: no step.
    """
    check_integer("steps", steps)
    full = system.gramians()
    hermitian, symmetric = denominators(steps * system.log_lam)  # 1 - (lam_i conj(lam_j))^steps, 1 - (lam_i lam_j)^steps
    P = real_gramian(full.P * hermitian, full.S * symmetric)
    return P, real_gramian(full.Q * hermitian.conj(), full.S_Q * symmetric.conj())


def frequency_weighted_gramians(
    system: DiagonalSystem, *, input_weight: DiagonalSystem | None = None, output_weight: DiagonalSystem | None = None
) -> tuple[Tensor, Tensor]:
    """P and Q, (2N, 2N) float64 in coordinates [Re x; Im x], of the system between two filters (Enns 1984).

    P is the covariance of the states where the input is white noise behind ``input_weight``, for example a model of the signals
    that are met; Q says what ``output_weight`` hears of the states.

    Args:
        system: unbatched.
        input_weight: its outputs are the system's inputs; None: white noise.
        output_weight: its inputs are the system's outputs; None: all frequencies alike.

    Raises:
        ArgumentError: a batch, or a filter with other numbers of inputs or outputs.
    """
    check_single(system)
    P, Q = real_gramians(system)
    at = Coordinates.of(system, "real")
    if input_weight is not None:
        if input_weight.batch_shape or input_weight.C.shape[0] != at.B.shape[1]:
            got = f"C of shape {tuple(input_weight.C.shape)}"
            raise bad_argument("input_weight", got=got, expected=f"{at.B.shape[1]} outputs, as many as the system has inputs")
        P = _driven(at.A, at.B, Coordinates.of(input_weight, "real"))
    if output_weight is not None:
        if output_weight.batch_shape or output_weight.B.shape[1] != at.C.shape[0]:
            got = f"B of shape {tuple(output_weight.B.shape)}"
            raise bad_argument("output_weight", got=got, expected=f"{at.C.shape[0]} inputs, as many as the system has outputs")
        heard = Coordinates.of(output_weight, "real")
        dual = Coordinates(heard.A.T, heard.C.T, heard.B.T, "real", heard.order)
        Q = _driven(at.A.T, at.C.T, dual)
    return P, Q


def _driven(A: Tensor, B: Tensor, filtered: Coordinates) -> Tensor:
    """The covariance of x_t = A x_{t-1} + B C w_t behind the filter w_t = A_w w_{t-1} + B_w noise."""
    n, inner = len(A), len(filtered.A)
    through = B @ filtered.C
    joint = torch.cat([torch.cat([A, through @ filtered.A], 1), torch.cat([A.new_zeros(inner, n), filtered.A], 1)])
    drive = torch.cat([through @ filtered.B, filtered.B])
    return lyapunov(joint, drive @ drive.T)[:n, :n]


def lyapunov(A: Tensor, M: Tensor) -> Tensor:
    """X = A X A^T + M of a stable A, by doubling (Smith 1968): X grows to a sum over twice as many steps at a time."""
    X = M
    for _ in range(DOUBLINGS):
        more = A @ X @ A.T
        X = X + more
        if float(more.norm()) <= 1e-17 * float(X.norm()):
            break
        A = A @ A
    return (X + X.T) / 2
