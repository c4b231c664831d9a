"""The C++ backend of the short causal convolution (``csrc/causal_conv1d.cpp``).

It has two forms: rows of channels, float32 or bfloat16, for tensors whose channels lie next to each other in memory, and rows
of time steps, float32, for the others.  Each reads its layout in place; a tensor of another layout is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.kernels import _cpp


def channels_next(x: Tensor) -> bool:
    """Whether the rows of x (batch, D, L) are rows of channels, as ``Arguments`` in csrc/causal_conv1d.cpp decides.

    The convolution's output has the same layout.
    """
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
    """Output (batch, D, L) in x's layout, differentiable."""
    return _cpp.library().causal_conv1d(x, weight, bias, initial_state, silu)


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias, initial_state); the first in x's layout, the last two empty for None."""
    return _cpp.library().causal_conv1d_backward(grad_out, x, weight, bias, initial_state, silu)
