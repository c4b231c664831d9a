"""The tau-blocked form of the LTI scan: matrix products over blocks of tau steps and a scan over L / tau block states.

With U_k the tau inputs of block k, stacked to tau H numbers, and h_k the state in front of it::

    h_{k+1} = lam^tau h_k + [lam^(tau-1) B, ..., lam B, B] U_k
    Y_k     = [C lam; C lam^2; ...; C lam^tau] h_k + T U_k,     T_ij = K_(i-j) for i >= j, K_d = Re(C lam^d B)

It trades the traffic of L states for the 2 tau H_in H_out extra operations per step of T, and pays where H is small.
All tables are differentiable functions of the parameters (planar, real arithmetic).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class BlockTables(NamedTuple):
    """Matrices of the blocked system: an LTI scan in its own right, whose output sees the previous state."""

    log_decay: Tensor  # (N,) of lam^tau
    phase: Tensor  # (N,)
    w_in: Tensor  # (2N, tau H)
    w_out: Tensor  # (tau H_out, 2N)
    feed: Tensor  # (tau H_out, tau H), block lower triangular Toeplitz


def powers(log_decay: Tensor, phase: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of lam^j for j = 0 .. count-1, each (count, N), formed in float64."""
    j = torch.arange(count, device=log_decay.device, dtype=torch.float64)[:, None]
    modulus = torch.exp(j * log_decay.double())
    angle = j * phase.double()
    return (modulus * angle.cos()).to(log_decay.dtype), (modulus * angle.sin()).to(log_decay.dtype)


def toeplitz(blocks: Tensor) -> Tensor:
    """Block lower triangular Toeplitz matrix (tau H_out, tau H) of blocks (tau, H_out, H)."""
    tau, h_out, h_in = blocks.shape
    windows = F.pad(blocks, (0, 0, 0, 0, tau - 1, 0)).unfold(0, tau, 1)  # [i, a, b, k] = blocks[i + k - (tau - 1)]
    return windows.flip(3).permute(0, 1, 3, 2).reshape(tau * h_out, tau * h_in)


def block_tables(
    log_decay: Tensor, phase: Tensor, w_in: Tensor, w_out: Tensor, D: Tensor | None, tau: int
) -> BlockTables:
    """Tables of the tau-blocked system for w_in (2N, H), w_out (H_out, 2N) = [Re C, -Im C], D (H,) or None."""
    p_re, p_im = powers(log_decay, phase, tau + 1)  # (tau + 1, N)
    b_re, b_im = w_in.chunk(2, 0)
    c_re, c_im = w_out.chunk(2, 1)  # Re C, -Im C
    q_re, q_im = p_re[:tau].flip(0).T[:, :, None], p_im[:tau].flip(0).T[:, :, None]  # (N, tau, 1)
    in_re = q_re * b_re[:, None] - q_im * b_im[:, None]  # (N, tau, H)
    in_im = q_re * b_im[:, None] + q_im * b_re[:, None]
    out_re = c_re * p_re[:, None] + c_im * p_im[:, None]  # Re(C lam^j): (tau + 1, H_out, N)
    out_im = c_im * p_re[:, None] - c_re * p_im[:, None]  # -Im(C lam^j)
    response = torch.cat([out_re, out_im], 2)  # (tau + 1, H_out, 2N)
    impulse = response[:tau] @ w_in  # (tau, H_out, H)
    if D is not None:
        impulse = torch.cat([impulse[:1] + torch.diag(D), impulse[1:]], 0)
    return BlockTables(
        tau * log_decay,
        tau * phase,
        torch.cat([in_re, in_im], 0).flatten(1),
        response[1:].flatten(0, 1),
        toeplitz(impulse),
    )
