"""Causal convolution of every channel with a kernel of its own, by FFT.

Both gradients are products of the transforms that the forward made with that of the output's gradient.  Differentiating the
transforms themselves instead would run complex ones where real ones do, and pad and slice on the way: about twice the work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compressm.kernels.core.custom_op import plain_call


def convolve(u: Tensor, kernel: Tensor) -> Tensor:
    """y_t = sum_s kernel_s u_(t-s), both taken to be zero before their start.

    Args:
        u: (batch, H, L) real.
        kernel: (H, L) of u's dtype.

    Returns:
        (batch, H, L).
    """
    if plain_call(u, kernel) and torch.is_grad_enabled() and (u.requires_grad or kernel.requires_grad):
        return _Convolution.apply(u, kernel)
    length = u.shape[-1]
    return _back(_forth(u) * _forth(kernel), length)


class _Convolution(torch.autograd.Function):
    """Where gradients of the gradients are asked for, the transforms are made again, as functions of the arguments."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, kernel: Tensor) -> Tensor:
        U, K = _forth(u), _forth(kernel)
        ctx.save_for_backward(u, kernel, U, K)
        return _back(U * K, u.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        u, kernel, U, K = ctx.saved_tensors
        if torch.is_grad_enabled():
            U, K = _forth(u), _forth(kernel)
        length, G = u.shape[-1], _forth(grads[0])
        to_u, to_kernel = ctx.needs_input_grad
        found = _back(G * K.conj(), length) if to_u else None
        return found, _back((G * U.conj()).sum(0), length) if to_kernel else None


def _forth(x: Tensor) -> Tensor:
    return torch.fft.rfft(x, n=2 * x.shape[-1])


def _back(X: Tensor, length: int) -> Tensor:
    return torch.fft.irfft(X, n=2 * length)[..., :length]
