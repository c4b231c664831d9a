"""In what memory a tensor lies: the order of its dimensions there, shared between processes, pinned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def placed_like(value: Tensor, old: Tensor) -> Tensor:
    """``value``, a tensor of its own, in memory like that of ``old``: shared, pinned, with its dimensions in that order."""
    value = ordered_like(value, old)
    if is_shared(old):
        return value.share_memory_()
    return value.pin_memory() if old.device.type == "cpu" and old.is_pinned() else value


def ordered_like(value: Tensor, old: Tensor) -> Tensor:
    """``value`` without gaps in memory, its dimensions in the order of ``old``'s strides.

    Fused optimizers run through parameters and their state as through flat arrays.
    """
    if old.is_contiguous() or value.dim() != old.dim():
        return value.contiguous()
    order = sorted(range(old.dim()), key=old.stride, reverse=True)
    return value.permute(order).contiguous().permute([order.index(axis) for axis in range(old.dim())])


def ordered_state(state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """A parameter's optimizer state with the tensors of its shape in its order."""
    return {
        key: ordered_like(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
        for key, value in state.items()
    }


def is_shared(tensor: Tensor) -> bool:
    """Whether other processes may see its memory; torch says so of every CUDA tensor, which means nothing."""
    return tensor.device.type == "cpu" and tensor.is_shared()
