"""The residual block of the LRU paper as one op of the C++ library (``csrc/fused_cpu/lru_block.cpp``)."""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.kernels.core import cpp
from compressm.kernels.core.custom_op import plain_call
from compressm.kernels.fused_cpu.gates import draw_seed
from compressm.kernels.lti_scan.op import choose_backend, launch


def lru_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    nu_log: Tensor,
    theta_log: Tensor,
    gamma_log: Tensor,
    B_re: Tensor,
    B_im: Tensor,
    C_re: Tensor,
    C_im: Tensor,
    D: Tensor,
    glu_weight: Tensor,
    glu_bias: Tensor | None,
    p: float,
) -> Tensor | None:
    """:class:`compressm.layers.LRUBlock` in eager mode on the CPU, with its gradient; None where it cannot run.

    It computes what the block's separate steps do and draws the same masks.  It cannot run for anything but float32, without
    elements, under autocast, where another backend is chosen, or while something traces.

    Args:
        x: (batch, L, H); the parameters as the block's; p: of both dropouts, 0 where nothing is to be dropped.

    Returns:
        (batch, L, H).
    """
    norm, lru = (norm_weight, norm_bias), (nu_log, theta_log, gamma_log, B_re, B_im, C_re, C_im, D)
    tensors = (x, *norm, *lru, glu_weight, glu_bias)
    if any(t is not None and t.dtype != torch.float32 for t in tensors) or x.numel() == 0 or torch.is_autocast_enabled("cpu"):
        return None
    if not plain_call(*tensors) or norm_weight.device != x.device:
        return None
    if choose_backend(x.device.type, x.dtype) != "cpp":
        return None
    tau, rows, store = launch("cpp", *x.shape, C_re.shape[0], nu_log.shape[0], False)
    seeds = draw_seed(x, p), draw_seed(x, p)
    store = store and torch.is_grad_enabled()
    return cpp.library().lru_block(x, *norm, *lru, glu_weight, glu_bias, *seeds, eps, p, tau, rows, store)[0]
