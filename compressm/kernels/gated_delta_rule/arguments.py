"""What the gated delta rule asks of its arguments."""

from __future__ import annotations

from torch import Tensor

from compressm.errors import bad_argument
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
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    chunk_size: int | None,
) -> None:
    """Raise ArgumentError unless everything fits, by the rules of :func:`compressm.kernels.gated_delta_rule`."""
    check_queries_and_values(q, v)
    heads, values = v.shape[2:]
    check_heads(q, heads)
    check_step(q, k, v, g, beta, heads, values)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    check_tensor("initial_state", initial_state, (sequences, heads, q.shape[-1], values), q)
    check_packed(cu_seqlens, q)
    check_scale(scale)
    check_chunk_size(chunk_size)


def check_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, heads: int, values: int) -> None:
    """Raise ArgumentError unless k, v, g and beta fit q (..., H, K) and ``heads`` heads of ``values`` channels."""
    gates = *q.shape[:-2], heads
    check_tensor("k", k, tuple(q.shape), q)
    check_tensor("v", v, (*gates, values), q)
    check_tensor("g", g, (*gates, q.shape[-1]) if g.dim() == q.dim() else gates, q)
    check_tensor("beta", beta, gates, q)


def check_scale(scale: float | None) -> None:
    """Raise ArgumentError unless this can be the scale of queries."""
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise bad_argument("scale", got=repr(scale), expected="a number, or None for K^-0.5")
