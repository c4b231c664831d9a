"""What ops of chunks, of packed sequences and of heads of queries, keys and values ask of their arguments alike."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from compressm.errors import bad_argument, check_integer
from compressm.kernels.core.custom_op import plain_call

INTEGERS = (torch.int32, torch.int64)


def check_queries_and_values(q: Tensor, v: Tensor) -> None:
    """Raise ArgumentError unless these can be q (batch, L, H, K) and v (batch, L, HV, V)."""
    for name, tensor, axes in (("q", q, "(batch, L, H, K)"), ("v", v, "(batch, L, HV, V)")):
        if tensor.dim() != 4 or not tensor.is_floating_point():
            raise bad_argument(name, got=f"{tuple(tensor.shape)} of {tensor.dtype}", expected=f"a real tensor {axes}")
    if v.shape[:2] != q.shape[:2]:
        expected = f"(batch, L, HV, V) with batch {q.shape[0]} and L {q.shape[1]} as in q"
        raise bad_argument("v", got=f"shape {tuple(v.shape)}", expected=expected)


def check_heads(q: Tensor, heads: int) -> None:
    """Raise ArgumentError unless q (..., H, K) has heads for ``heads`` heads of values."""
    if q.shape[-2] == 0 or heads % q.shape[-2]:
        raise bad_argument("q", got=f"{q.shape[-2]} heads", expected=f"a number of heads that divides HV = {heads}, v's")


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


def check_packed(cu_seqlens: Tensor | None, q: Tensor) -> None:
    """Raise ArgumentError unless these are None, or bounds of sequences in q (batch, L, ...)."""
    if cu_seqlens is None:
        return
    check_cu_seqlens(cu_seqlens, "q", q.shape[0])
    if cu_seqlens.device != q.device:
        raise bad_argument("cu_seqlens", got=f"device {cu_seqlens.device}", expected=f"{q.device}, where q is")
    if q.device.type == "cpu" and plain_call(cu_seqlens):  # else there may be no values to look at
        check_bounds(cu_seqlens, q.shape[1])


def check_cu_seqlens(cu_seqlens: Tensor, packed: str, batch: int) -> None:
    """Raise ArgumentError unless these can be bounds of sequences in the tensor ``packed`` of this batch."""
    if cu_seqlens.dtype not in INTEGERS:
        raise bad_argument("cu_seqlens", got=f"{cu_seqlens.dtype}", expected="int32 or int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        got = f"shape {tuple(cu_seqlens.shape)}"
        raise bad_argument("cu_seqlens", got=got, expected="(sequences + 1,) numbers from 0 to L")
    if batch != 1:
        expected = "a batch of 1, as cu_seqlens packs the sequences along L"
        raise bad_argument(packed, got=f"a batch of {batch}", expected=expected)


def check_bounds(cu_seqlens: Tensor, length: int) -> None:
    """Raise ArgumentError unless the numbers themselves rise from 0 to L."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in itertools.pairwise(bounds)):
        raise bad_argument("cu_seqlens", got=bounds, expected=f"numbers that rise from 0 to L = {length}")


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise ArgumentError unless these can be the steps of a chunk."""
    if chunk_size is not None:
        expected = "a whole number of steps from 1 to 2^31 - 1, or None"
        check_integer("chunk_size", chunk_size, most=2**31 - 1, expected=expected)
