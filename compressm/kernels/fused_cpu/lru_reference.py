"""The scan's operands of an LRU, by torch's own operations."""

from __future__ import annotations

import torch
from torch import Tensor


def lru_operands(
    nu_log: Tensor, theta_log: Tensor, gamma_log: Tensor, B_re: Tensor, B_im: Tensor, C_re: Tensor, C_im: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log_decay (N,), phase (N,), w_in (2N, H), w_out (H_out, 2N)."""
    gamma = gamma_log.exp()[:, None]
    w_in, w_out = torch.cat([gamma * B_re, gamma * B_im], 0), torch.cat([C_re, -C_im], 1)
    return -nu_log.exp(), theta_log.exp(), w_in, w_out
