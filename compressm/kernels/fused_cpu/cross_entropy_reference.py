"""Reference of the cross-entropy: torch's own, in float32 at least.  Autograd differentiates it as it stands."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(scores: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Losses (rows,) of scores (rows, classes), 0 where the target is ``ignore_index``, or their reduction."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return F.cross_entropy(wide, targets, ignore_index=ignore_index, reduction=reduction)
