"""What linear attention asks of its arguments."""

from __future__ import annotations

import math

from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels.core.custom_op import plain_call
from compressm.kernels.ssd.arguments import check_bounds, check_chunk_size, check_cu_seqlens


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
    for name, tensor, axes in (("q", q, "(batch, L, H, K)"), ("v", v, "(batch, L, HV, V)")):
        if tensor.dim() != 4 or not tensor.is_floating_point():
            raise bad_argument(name, got=f"{tuple(tensor.shape)} of {tensor.dtype}", expected=f"a real tensor {axes}")
    batch, length, _, keys = q.shape
    heads, values = v.shape[2:]
    if v.shape[:2] != q.shape[:2]:
        expected = f"(batch, L, HV, V) with batch {batch} and L {length} as in q"
        raise bad_argument("v", got=f"shape {tuple(v.shape)}", expected=expected)
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    check_step(q, k, v, g, scale)
    check_tensor("initial_state", initial_state, (sequences, heads, keys, values + normalize), q)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, "q", batch)
        if cu_seqlens.device != q.device:
            raise bad_argument("cu_seqlens", got=f"device {cu_seqlens.device}", expected=f"{q.device}, where q is")
        if q.device.type == "cpu" and plain_call(cu_seqlens):  # else there may be no values to look at
            check_bounds(cu_seqlens, length)
    check_chunk_size(chunk_size)


def check_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float | None) -> None:
    """Raise ArgumentError unless k, v, g and the scale fit q (..., H, K)."""
    *steps, groups, keys = q.shape
    heads = v.shape[-2]
    if groups == 0 or heads % groups:
        raise bad_argument("q", got=f"{groups} heads", expected=f"a number of heads that divides HV = {heads}, v's")
    check_tensor("k", k, tuple(q.shape), q)
    check_tensor("v", v, (*steps, *v.shape[-2:]), q)
    if g is not None:
        allowed = (heads,), (*steps, heads), (*steps, heads, keys)
        found = [shape for shape in allowed if len(shape) == g.dim()]
        if not found or tuple(g.shape) != found[0]:
            raise bad_argument("g", got=f"shape {tuple(g.shape)}", expected=f"None or one of the shapes {allowed}")
        check_tensor("g", g, found[0], q)
    number = isinstance(scale, int | float) and not isinstance(scale, bool) and math.isfinite(scale)
    if scale is not None and not number:
        raise bad_argument("scale", got=repr(scale), expected="a finite number, or None for K^-0.5")


def check_tensor(name: str, tensor: Tensor | None, shape: tuple[int, ...], q: Tensor) -> None:
    """Raise ArgumentError unless the tensor is None, or real, of this shape, and where q is."""
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise bad_argument(name, got=f"shape {tuple(tensor.shape)}", expected=f"shape {shape}")
    if not tensor.is_floating_point():
        raise bad_argument(name, got=str(tensor.dtype), expected="a real floating point tensor")
    if tensor.device != q.device:
        raise bad_argument(name, got=f"device {tensor.device}", expected=f"{q.device}, where q is")
