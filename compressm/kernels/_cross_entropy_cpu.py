"""The C++ backend of the cross-entropy (``csrc/cross_entropy.cpp``), float32 or bfloat16."""

from __future__ import annotations

from torch import Tensor

from compressm.kernels import _cpp


def forward(scores: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Losses (rows,) and normalizers (rows, 2), see ``csrc/cross_entropy.h``."""
    return _cpp.library().cross_entropy(scores.contiguous(), targets.contiguous(), ignore_index)


def backward(grad_losses: Tensor, scores: Tensor, targets: Tensor, normalizers: Tensor, ignore_index: int) -> Tensor:
    """Gradient of scores (rows, classes) in their dtype, contiguous."""
    return _cpp.library().cross_entropy_backward(
        grad_losses.contiguous(), scores.contiguous(), targets.contiguous(), normalizers, ignore_index
    )
