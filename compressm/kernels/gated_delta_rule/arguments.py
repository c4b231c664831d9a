"""What the gated delta rule asks of its arguments."""

from __future__ import annotations

from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels.core.custom_op import plain_call
from compressm.kernels.ssd.arguments import check_bounds, check_chunk_size, check_cu_seqlens


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
    for name, tensor, axes in (("q", q, "(batch, L, H, K)"), ("v", v, "(batch, L, HV, V)")):
        if tensor.dim() != 4 or not tensor.is_floating_point():
            raise bad_argument(name, got=f"{tuple(tensor.shape)} of {tensor.dtype}", expected=f"a real tensor {axes}")
    batch, length, _, keys = q.shape
    heads, values = v.shape[2:]
    if v.shape[:2] != q.shape[:2]:
        expected = f"(batch, L, HV, V) with batch {batch} and L {length} as in q"
        raise bad_argument("v", got=f"shape {tuple(v.shape)}", expected=expected)
    check_heads(q, heads)
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    steps = (batch, length, heads)
    check_rest(
        q, {
            "k": (k, tuple(q.shape)), "g": (g, (*steps, keys) if g.dim() == 4 else steps), "beta": (beta, steps),
            "initial_state": (initial_state, (sequences, heads, keys, values)),
        },
        v=v,
    )  # fmt: skip
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, "q", batch)
        if cu_seqlens.device != q.device:
            raise bad_argument("cu_seqlens", got=f"device {cu_seqlens.device}", expected=f"{q.device}, where q is")
        if q.device.type == "cpu" and plain_call(cu_seqlens):  # else there may be no values to look at
            check_bounds(cu_seqlens, length)
    check_scale(scale)
    check_chunk_size(chunk_size)


def check_heads(q: Tensor, heads: int) -> None:
    """Raise ArgumentError unless q (..., H, K) has heads for ``heads`` heads of values."""
    if q.shape[-2] == 0 or heads % q.shape[-2]:
        raise bad_argument("q", got=f"{q.shape[-2]} heads", expected=f"a number of heads that divides HV = {heads}, v's")


def check_rest(q: Tensor, wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]], **others: Tensor) -> None:
    """Raise ArgumentError unless these are real tensors where q is, those of ``wanted`` of the shapes that it gives."""
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise bad_argument(name, got=f"shape {tuple(tensor.shape)}", expected=f"shape {shape}")
    for name, tensor in (*others.items(), *((name, tensor) for name, (tensor, _) in wanted.items())):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise bad_argument(name, got=str(tensor.dtype), expected="a real floating point tensor")
        if tensor.device != q.device:
            raise bad_argument(name, got=f"device {tensor.device}", expected=f"{q.device}, where q is")


def check_scale(scale: float | None) -> None:
    """Raise ArgumentError unless this can be the scale of queries."""
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise bad_argument("scale", got=repr(scale), expected="a number, or None for K^-0.5")
