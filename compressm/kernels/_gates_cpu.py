"""The C++ backend of the gates (``csrc/gates.cpp``), float32; tensors that are not contiguous are copied."""

from __future__ import annotations

from torch import Tensor

from compressm.kernels import _cpp


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
