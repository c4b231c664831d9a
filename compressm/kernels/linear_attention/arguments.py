"""What linear attention asks of its arguments."""

from __future__ import annotations

import math

from torch import Tensor

from compressm.errors import bad_argument, check_number
from compressm.kernels.core.arguments import (
    check_chunk_size,
    check_heads,
    check_packed,
    check_queries_and_values,
    check_tensor,
)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize: bool,
    chunk_size: int | None,
) -> None:
    """Raise ArgumentError unless everything fits, by the rules of :func:`compressm.kernels.linear_attention`."""
    check_queries_and_values(q, v)
    heads, values = v.shape[2:]
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    check_step(q, k, v, g, scale)
    check_tensor("initial_state", initial_state, (sequences, heads, q.shape[-1], values + normalize), q)
    check_packed(cu_seqlens, q)
    check_chunk_size(chunk_size)


def check_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float | None) -> None:
    """Raise ArgumentError unless k, v, g and the scale fit q (..., H, K)."""
    *steps, _, keys = q.shape
    heads = v.shape[-2]
    check_heads(q, heads)
    check_tensor("k", k, tuple(q.shape), q)
    check_tensor("v", v, (*steps, *v.shape[-2:]), q)
    if g is not None:
        allowed = (heads,), (*steps, heads), (*steps, heads, keys)
        found = [shape for shape in allowed if len(shape) == g.dim()]
        if not found or tuple(g.shape) != found[0]:
            raise bad_argument("g", got=f"shape {tuple(g.shape)}", expected=f"None or one of the shapes {allowed}")
        check_tensor("g", g, found[0], q)
    if scale is not None:
        check_number("scale", scale, "a finite number, or None for K^-0.5", math.isfinite)
