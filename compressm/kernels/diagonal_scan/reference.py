"""Reference of the diagonal scan: the definition, one step at a time, in plain torch; any real dtype including float64.

The oracle of every other form.  Autograd differentiates it as it stands.
"""

from __future__ import annotations

import torch
from torch import Tensor


def eigenvalue(log_decay: Tensor, phase: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of exp(log_decay + i phase), each (N,)."""
    modulus = log_decay.exp()
    return modulus * phase.cos(), modulus * phase.sin()


def diagonal_scan(
    x: Tensor, log_decay: Tensor, phase: Tensor, initial_state: Tensor | None = None, reverse: bool = False
) -> Tensor:
    """All states h_t = lam h_{t-1} + x_t (reverse: h_t = lam h_{t+1} + x_t), planar.

    Args:
        x: (batch, L, 2N), real parts then imaginary parts.
        log_decay, phase: (N,), lam = exp(log_decay + i phase).
        initial_state: (batch, 2N) or None for zero.

    Returns:
        (batch, L, 2N) in x's dtype; float32 arithmetic for half precision.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    lam_re, lam_im = eigenvalue(log_decay.to(work), phase.to(work))
    steps = x.to(work).unbind(1)
    if initial_state is None:
        initial_state = x.new_zeros((x.shape[0], x.shape[2]), dtype=work)
    re, im = initial_state.to(work).chunk(2, -1)
    states = []
    for step in reversed(steps) if reverse else steps:
        x_re, x_im = step.chunk(2, -1)
        re, im = lam_re * re - lam_im * im + x_re, lam_re * im + lam_im * re + x_im
        states.append(torch.cat([re, im], -1))
    if not states:
        return x.clone()
    return torch.stack(states[::-1] if reverse else states, 1).to(x.dtype)
