"""The C++ backend of the normalisations (``csrc/norms.cpp``), float32; tensors without dense rows in order are copied."""

from __future__ import annotations

from torch import Tensor

from compressm.kernels import _cpp


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
    """Output, contiguous."""
    bias = weight.new_zeros(weight.shape) if bias is None else bias.contiguous()
    return _cpp.library().norm(x.contiguous(), weight.contiguous(), bias, eps, centred)


def backward(grad_out: Tensor, x: Tensor, weight: Tensor, eps: float, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias); the last is empty unless ``centred``."""
    return _cpp.library().norm_backward(grad_out.contiguous(), x.contiguous(), weight.contiguous(), eps, centred)
