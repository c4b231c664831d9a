"""Reference of the linear layer behind a standardisation: torch's own operations, which autograd differentiates."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def standardized_linear(x: Tensor, mean: Tensor, std: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) -> (..., H) in the dtype of mean, or as autocast says."""
    return F.linear((x.to(mean.dtype) - mean) / std, weight, bias)
