"""Memory layouts in which kernels meet their tensors."""

from __future__ import annotations

import torch


def lay_out(tensor, layout):
    """The tensor's values elsewhere: ``"slice"`` of a wider one, ``"transposed"`` in the order of its axes, or dense."""
    if layout == "slice":
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"), dtype=tensor.dtype)
        home = wide[..., 3:]
    elif layout == "transposed":
        home = torch.empty(tensor.shape[::-1], dtype=tensor.dtype).permute(*reversed(range(tensor.dim())))
    else:
        return tensor.clone(memory_format=torch.contiguous_format)
    return home.copy_(tensor)
