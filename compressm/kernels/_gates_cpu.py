"""The C++ backend of the gates (``csrc/gates.cpp``), float32; tensors that are not contiguous are copied."""

from __future__ import annotations

from torch import Tensor

from compressm.kernels import _cpp

NARROW = 8  # kNarrow in csrc/gates.h


def gelu_dropout(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """dropout(gelu(x)); seed () int64, None for p = 0."""
    return _cpp.library().gelu_dropout(x.contiguous(), seed, p)


def gelu_dropout_backward(grad_out: Tensor, x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """Gradient of x."""
    return _cpp.library().gelu_dropout_backward(grad_out.contiguous(), x.contiguous(), seed, p)


def glu_dropout_add(pre: Tensor, residual: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """residual + dropout(a sigmoid(b)), pre = [a | b]."""
    return _cpp.library().glu_dropout_add(pre.contiguous(), residual.contiguous(), seed, p)


def glu_dropout_add_backward(grad_out: Tensor, pre: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """Gradient of pre."""
    return _cpp.library().glu_dropout_add_backward(grad_out.contiguous(), pre.contiguous(), seed, p)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """residual + dropout(a sigmoid(b)), x weight^T + bias = [a | b]; at most NARROW inputs and channels."""
    dense = (t.contiguous() for t in (x, weight, bias, residual))
    return _cpp.library().gated_linear(*dense, seed, p)


def gated_linear_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, seed: Tensor | None, p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    dense = (t.contiguous() for t in (grad_out, x, weight, bias))
    return _cpp.library().gated_linear_backward(*dense, seed, p)
