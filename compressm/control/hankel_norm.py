"""The Hankel nuclear norm of a system as a loss: the sum of its Hankel singular values, with its gradient.

In coordinates where both Gramians are diag(sigma), columns t_i of T and rows w_i of its inverse give P = T diag(sigma) T^H and
Q = W diag(sigma) W^H.  The derivative of sigma_i is then (w_i^H dP w_i + t_i^H dQ t_i) / 2 (first-order perturbation of the
eigenvalues sigma_i^2 of P Q), so that

    (tr(W^H P W) + tr(T^H Q T)) / 2   with T and W held fixed

has the norm's value and its gradient, also where singular values coincide: nothing differentiates a decomposition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.control.balancing import balancing_bases
from compressm.control.coordinates import gramians_of_real
from compressm.kernels import gramians


def hankel_nuclear_norm(log_lam: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Sum of the 2N Hankel singular values of the real system y = Re(C h), h_t = exp(log_lam) h_{t-1} + B u_t; float64.

    Args:
        log_lam: (N,) complex, logarithms of the eigenvalues, real part below zero.
        B: (N, H_in) complex.
        C: (H_out, N) complex.
    """
    P, Q = gramians_of_real(gramians(log_lam, B, C))
    with torch.no_grad():
        T, W = balancing_bases(P, Q)
    return ((W.mH @ P * W.mT).sum() + (T.mH @ Q * T.mT).sum()) / 2
