"""What Mamba-2's scan asks of its arguments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels.core.arguments import INTEGERS, check_bounds, check_chunk_size, check_cu_seqlens
from compressm.kernels.core.custom_op import plain_call

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    dt_limit: tuple[float, float],
) -> tuple[float, float]:
    """The limits of a step; raises ArgumentError unless everything fits, by the rules of :func:`compressm.kernels.ssd`."""
    _check_kinds(
        x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_states=initial_states, seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    if x.dim() != 4:
        raise bad_argument("x", got=f"shape {tuple(x.shape)}", expected="(batch, L, H, P)")
    batch, length, heads, channels = x.shape
    states = _check_mixing(x, B, C)
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    for name, tensor, shape in (
        ("dt", dt, (batch, length, heads)),
        ("A", A, (heads,)),
        ("z", z, (batch, length, heads, channels)),
        ("dt_bias", dt_bias, (heads,)),
        ("initial_states", initial_states, (sequences, heads, channels, states)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise bad_argument(name, got=f"shape {tuple(tensor.shape)}", expected=f"shape {shape}")
    if D is not None and D.shape not in ((heads,), (heads, channels)):
        raise bad_argument("D", got=f"shape {tuple(D.shape)}", expected=f"shape {(heads,)} or {(heads, channels)}")
    _check_packing(seq_idx, cu_seqlens, batch, length)
    if x.device.type == "cpu" and plain_call(A, seq_idx, cu_seqlens):  # else there may be no values to look at
        _check_values(A, seq_idx, cu_seqlens, length)
    check_chunk_size(chunk_size)
    return _limits(dt_limit)


def _check_kinds(*, x: Tensor, **others: Tensor | None) -> None:
    """Dense tensors on one device, of real numbers or, where they say how sequences are packed, of integers."""
    for name, tensor in {"x": x, **others}.items():
        if tensor is None and name not in ("x", "dt", "A", "B", "C"):
            continue
        if not isinstance(tensor, Tensor):
            raise bad_argument(name, got=type(tensor).__name__, expected="a tensor")
        packing = name in ("seq_idx", "cu_seqlens")
        if tensor.dtype not in (INTEGERS if packing else FLOATS) or tensor.layout != torch.strided:
            got = f"{tuple(tensor.shape)} of {tensor.dtype}, {tensor.layout}"
            kind = "int32 or int64" if packing else "float32, bfloat16, float16 or float64"
            raise bad_argument(name, got=got, expected=f"a dense tensor of {kind}")
        if tensor.device != x.device:
            raise bad_argument(name, got=f"device {tensor.device}", expected=f"{x.device}, where x is")


def _check_mixing(x: Tensor, B: Tensor, C: Tensor) -> int:
    """N."""
    batch, length, heads, _ = x.shape
    if B.dim() != 4 or B.shape[:2] != x.shape[:2]:
        expected = f"(batch, L, G, N) with batch {batch} and L {length} as in x"
        raise bad_argument("B", got=f"shape {tuple(B.shape)}", expected=expected)
    groups, states = B.shape[2:]
    if groups == 0 or heads % groups:
        raise bad_argument("B", got=f"{groups} groups", expected=f"a number of groups that divides H = {heads}")
    if C.shape != B.shape:
        raise bad_argument("C", got=f"shape {tuple(C.shape)}", expected=f"shape {tuple(B.shape)} as B's")
    return states


def _check_packing(seq_idx: Tensor | None, cu_seqlens: Tensor | None, batch: int, length: int) -> None:
    if seq_idx is not None:
        if cu_seqlens is not None:
            raise bad_argument("seq_idx, cu_seqlens", got="both", expected="one of the two")
        if seq_idx.shape != (batch, length):
            raise bad_argument("seq_idx", got=f"shape {tuple(seq_idx.shape)}", expected=f"(batch, L) = {(batch, length)}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, "x", batch)


def _check_values(A: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None, length: int) -> None:
    if A.numel():
        low, high = (bound.item() for bound in torch.aminmax(A.detach()))
        if not (math.isfinite(low) and high <= 0):
            got = "NaN or infinite values" if not math.isfinite(low + high) else f"values up to {high:.3g}"
            raise bad_argument("A", got=got, expected="finite values, none positive", remedy="A = -exp(A_log) is negative.")
    if seq_idx is not None and bool((seq_idx[:, 1:] < seq_idx[:, :-1]).any()):
        got = "numbers that decrease from a step to the next"
        raise bad_argument("seq_idx", got=got, expected="numbers that never decrease along a row")
    if cu_seqlens is not None:
        check_bounds(cu_seqlens, length)


def _limits(dt_limit: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (float(limit) for limit in dt_limit)
    except (TypeError, ValueError):
        raise bad_argument("dt_limit", got=repr(dt_limit), expected="two numbers, the least and the largest step") from None
    if not (low <= high and low < math.inf):
        raise bad_argument("dt_limit", got=repr(dt_limit), expected="the least step, which is finite, then the largest")
    return low, high
