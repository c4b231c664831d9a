"""Gramians of diagonal systems, formula by formula: the oracle of the faster forms."""

from __future__ import annotations

import torch
from torch import Tensor


def denominators(log_lam: Tensor) -> tuple[Tensor, Tensor]:
    """1 - lam_i conj(lam_j) and 1 - lam_i lam_j without cancellation, for eigenvalues as close to one as floats go.

    With a = -Re log_lam, e = exp(-a), eps = -expm1(-a) and d the difference (sum) of the phases,
    1 - e_i e_j exp(i d) = (eps_i + e_i eps_j) + 2 e_i e_j sin(d/2)^2 - i e_i e_j sin(d).

    Args:
        log_lam: (..., N) complex128, logarithms of the eigenvalues.

    Returns:
        two (..., N, N) complex128 tensors.
    """
    e, eps, theta = log_lam.real.exp(), -torch.expm1(log_lam.real), log_lam.imag
    product = e[..., :, None] * e[..., None, :]
    plain = eps[..., :, None] + e[..., :, None] * eps[..., None, :]

    def denominator(d: Tensor) -> Tensor:
        return torch.complex(plain + 2 * product * torch.sin(d / 2) ** 2, -product * torch.sin(d))

    return (
        denominator(theta[..., :, None] - theta[..., None, :]),
        denominator(theta[..., :, None] + theta[..., None, :]),
    )


def gramian_quad(log_lam: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, S, Q, S_Q of batched systems; shapes and meaning as in :func:`compressm.kernels.gramians`."""
    hermitian, symmetric = denominators(log_lam)
    B_dual = C.mH
    return (
        B @ B.mH / hermitian,
        B @ B.mT / symmetric,
        B_dual @ B_dual.mH / hermitian.conj(),
        B_dual @ B_dual.mT / symmetric.conj(),
    )
