"""Arguments of different precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def common_dtype(first: Tensor, *others: Tensor | None) -> torch.dtype:
    """The dtype that all of them promote to; None counts for nothing."""
    common = first.dtype
    for tensor in others:
        if tensor is not None and tensor.dtype != common:
            common = torch.promote_types(common, tensor.dtype)
    return common


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Any:
    """The tensor in a dtype, itself where it has it; None for None."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)
