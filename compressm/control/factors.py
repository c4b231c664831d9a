"""Factors of Gramians, and Hankel singular values from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DROP = 1e-15  # eigenvalues of a scaled Gramian below this share of the largest are rounding noise


def factor(gramian: Tensor) -> Tensor:
    """L (n, k) with L L^H = gramian up to rounding, k the numerical rank.

    The Gramian is scaled to a unit diagonal first, so that small states keep their relative accuracy.
    """
    scale = gramian.diagonal().real.clamp(min=0).sqrt()
    alive = scale > 0
    if not bool(alive.any()):
        return gramian.new_zeros(gramian.shape[0], 0)
    inverse = torch.where(alive, 1 / torch.where(alive, scale, 1.0), 0.0)
    correlation = gramian * inverse[:, None] * inverse[None, :]
    correlation = 0.5 * (correlation + correlation.mH)
    eigenvalues, vectors = torch.linalg.eigh(correlation)
    keep = eigenvalues > DROP * eigenvalues[-1]
    return scale[:, None] * vectors[:, keep] * eigenvalues[keep].sqrt()


def singular_values(P: Tensor, Q: Tensor) -> Tensor:
    """Hankel singular values of a pair of Gramians, descending, without bases."""
    L_p, L_q = factor(P), factor(Q)
    unit_p, unit_q = power_of_two(L_p), power_of_two(L_q)
    hsv = torch.zeros(P.shape[0], dtype=torch.float64, device=P.device)
    sigma = torch.linalg.svdvals((L_q / unit_q).mH @ (L_p / unit_p))
    hsv[: len(sigma)] = sigma * (unit_p * unit_q)
    return hsv


def cross_root(P: Tensor, Q: Tensor) -> Tensor:
    """Q^(1/2) P^(1/2), (..., n, n) as both: unlike products of other factors it is continuous in P and Q."""
    roots = []
    for gramian in (Q, P):
        weight, basis = torch.linalg.eigh(0.5 * (gramian + gramian.mH))
        roots.append((basis * weight.clamp_min(0).sqrt()[..., None, :]) @ basis.mH)
    return roots[0] @ roots[1]


def power_of_two(L: Tensor) -> float:
    """The power of two next to the norm of a factor; 1 for zero."""
    size = float(torch.linalg.vector_norm(L)) if L.numel() else 0.0
    return 2.0 ** round(math.log2(size)) if size > 0 else 1.0
