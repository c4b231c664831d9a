"""Many single-input single-output systems with real diagonal A at once: Hankel singular values in O(N k) each.

With a = exp(log_lam), both Gramians are a diagonal times K_ij = 1 / (1 - a_i a_j) times that diagonal, so that the Hankel
singular values are the moduli of the eigenvalues of L^T diag(b c) L for any K = L L^T.  K is the Szego kernel at the points a,
whose pivoted Cholesky factor is known in closed form: column k holds the Takenaka-Malmquist function of the pivots so far,
every entry a product, hence accurate to rounding relative to itself.  Its rank is small (about 30 for N = 128), since a
column is smaller than the last by the Blaschke factor of the pivot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.errors import bad_argument

DROP = 1e-18  # share of the largest diagonal entry of K below which nothing is left to factor
SLAB_BYTES = 256 << 20


def szego_factor(log_lam: Tensor) -> Tensor:
    """L (..., N, k) float64 with (L L^T)_ij = 1 / (1 - exp(log_lam_i + log_lam_j)) up to rounding.

    Args:
        log_lam: (..., N) real, below zero.
    """
    a = log_lam.double()
    norm = -torch.expm1(2 * a)  # 1 - a_i^2
    lam = a.exp()
    g = torch.ones_like(a)  # product of Blaschke factors of the pivots so far
    columns = []
    floor = DROP * (1 / norm).amax(-1)
    for _ in range(a.shape[-1]):
        rest = g.square() / norm
        largest, pivot = rest.max(-1, keepdim=True)
        if bool((largest[..., 0] <= floor).all()):
            break
        at, gap = a.gather(-1, pivot), norm.gather(-1, pivot)
        apart = -torch.expm1(a + at)  # 1 - a_i a_k
        columns.append(g * gap.sqrt() / apart)
        g = g * lam.gather(-1, pivot) * torch.expm1(a - at) / apart
    return torch.stack(columns, -1)


def siso_hankel_singular_values(log_lam: Tensor, gain: Tensor) -> Tensor:
    """Hankel singular values of x_t = exp(log_lam) x_{t-1} + b u_t, y_t = c x_t, descending.

    Args:
        log_lam: (..., N) real, below zero.
        gain: (..., N) real, products b_n c_n.

    Returns:
        (..., N) float64.

    Raises:
        ArgumentError: complex tensors, or shapes that differ.
    """
    if log_lam.is_complex() or gain.is_complex() or log_lam.shape != gain.shape:
        got = f"{tuple(log_lam.shape)} {log_lam.dtype} and {tuple(gain.shape)} {gain.dtype}"
        raise bad_argument("log_lam, gain", got=got, expected="two real tensors of one shape (..., N)")
    n = log_lam.shape[-1]
    rows, products = log_lam.reshape(-1, n), gain.reshape(-1, n).double()
    values = torch.zeros(rows.shape[0], n, dtype=torch.float64, device=rows.device)
    slab = max(1, SLAB_BYTES // (8 * n * min(n, 48)))
    for first in range(0, len(rows), slab):
        part = slice(first, first + slab)
        L = szego_factor(rows[part])
        core = L.mT @ (products[part, :, None] * L)
        values[part, : L.shape[-1]] = torch.linalg.eigvalsh(core).abs().sort(-1, descending=True).values
    return values.reshape(gain.shape)
