"""The C++ backend of the short causal convolution (``csrc/causal_conv1d/causal_conv1d.cpp``).

It has two forms: rows of channels, float32 or bfloat16, for tensors whose channels lie next to each other in memory and for
several sequences in a row, and rows of time steps, float32, for the others.  Each reads its layout in place; a tensor of
another layout is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.kernels.core import cpp

MAX_WIDTH = 8  # kMaxConvWidth in csrc/causal_conv1d/causal_conv1d.h


def why_not(device: str, dtype: torch.dtype, wide: bool) -> str | None:
    """None if the C++ kernels run for tensors of this device type and dtype, else the reason; wide: more than 8 taps."""
    if device == "cpu" and dtype != torch.float64 and wide:
        return f"the C++ kernels take up to {MAX_WIDTH} taps; more run on the reference"
    return cpp.why_not_for(device, dtype)


def channels_next(x: Tensor) -> bool:
    """Whether the rows of x (batch, D, L) are rows of channels, as ``Arguments`` in ``causal_conv1d.cpp`` decides.

    The convolution's output has the same layout.
    """
    return x.stride(1) == 1 and x.shape[1] > 1


def dtype_of_rows(x: Tensor, initial_states: Tensor | None, packed: bool) -> torch.dtype:
    """In which the kernels take x and the states in front of it: bfloat16 where both are, in rows of channels, else float32.

    Args:
        packed: there are several sequences in a row, which run as rows of channels in any layout.
    """
    rows = packed or channels_next(x)
    native = rows and all(t is None or t.dtype == torch.bfloat16 for t in (x, initial_states))
    return torch.bfloat16 if native else torch.float32


def empty_like_output(x: Tensor) -> Tensor:
    """Dense memory for a result (batch, D, L) in the layout that x has."""
    batch, channels, length = x.shape
    return x.new_empty((batch, length, channels)).mT if channels_next(x) else x.new_empty((batch, channels, length))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> Tensor:
    """Output (batch, D, L) in x's layout, differentiable."""
    return cpp.library().causal_conv1d(x, weight, bias, seq_idx, initial_states, cu_seqlens, silu)


def backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias, initial_states); the first in x's layout, the last two empty for None."""
    return cpp.library().causal_conv1d_backward(
        grad_out, x, weight, bias, seq_idx, initial_states, cu_seqlens, silu
    )
