"""The C++ backend of the short causal convolution (``csrc/causal_conv1d.cpp``).

It has two forms: rows of channels, float32 or bfloat16, for tensors whose channels lie next to each other in memory, and rows
of time steps, float32, for the others.  Each reads its layout in place; a tensor of another layout is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.kernels import _cpp


def channels_next(x: Tensor) -> bool:
    """Whether the rows of x (batch, D, L) are rows of channels: the convolution's output has the same layout."""
    return x.stride(1) == 1 and x.shape[1] > 1


def dtype_of_rows(x: Tensor, initial_state: Tensor | None) -> torch.dtype:
    """In which the kernels take x and the state in front of it: bfloat16 where both are, in rows of channels, else float32."""
    native = channels_next(x) and all(t is None or t.dtype == torch.bfloat16 for t in (x, initial_state))
    return torch.bfloat16 if native else torch.float32


def empty_like_output(x: Tensor) -> Tensor:
    """Dense memory for a result (batch, D, L) in the layout that x has."""
    batch, channels, length = x.shape
    return x.new_empty((batch, length, channels)).mT if channels_next(x) else x.new_empty((batch, channels, length))


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, silu: bool) -> Tensor:
    """Output (batch, D, L) in x's layout."""
    library, bias, state = _cpp.library(), _or_zeros(bias, weight, x.shape[1]), _state(x, weight, initial_state)
    if channels_next(x):
        return library.causal_conv1d_channels(x.mT, weight.t().contiguous(), bias, state.mT.contiguous(), silu).mT
    return library.causal_conv1d_steps(_rows(x), weight.contiguous(), bias, state.contiguous(), silu)


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias, initial_state); the first in x's layout, the last two empty for None."""
    library, full_bias, state = _cpp.library(), _or_zeros(bias, weight, x.shape[1]), _state(x, weight, initial_state)
    if channels_next(x):
        grads = library.causal_conv1d_channels_backward(
            _rows(grad_out.mT), x.mT, weight.t().contiguous(), full_bias, state.mT.contiguous(), silu
        )
        grad_x, grad_weight, grad_bias, grad_state = grads
        grad_x, grad_weight, grad_state = grad_x.mT, grad_weight.t().contiguous(), grad_state.mT.contiguous()
    else:
        grad_x, grad_weight, grad_bias, grad_state = library.causal_conv1d_steps_backward(
            _rows(grad_out), _rows(x), weight.contiguous(), full_bias, state.contiguous(), silu
        )
    return (
        grad_x,
        grad_weight,
        weight.new_empty((0,)) if bias is None else grad_bias,
        weight.new_empty((0,)) if initial_state is None else grad_state,
    )


def _or_zeros(tensor: Tensor | None, like: Tensor, *shape: int) -> Tensor:
    return like.new_zeros(shape) if tensor is None else tensor.contiguous()


def _state(x: Tensor, weight: Tensor, initial_state: Tensor | None) -> Tensor:
    return _or_zeros(initial_state, x, *x.shape[:2], weight.shape[1] - 1)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its last axis is dense in memory, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
