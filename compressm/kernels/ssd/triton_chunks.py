"""What launches of chunked kernels have alike: where the chunks lie, how products are rounded, how tensors are read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Chunks(NamedTuple):
    """Where the chunks of a call lie.

    Attributes:
        count: of all sequences; where they are packed, with room for an incomplete one at the end of each.
        row: chunks of a batch row.
        firsts, ends: (sequences,) int64, the first chunk of each sequence and the one behind its last; None: rows of the batch.
        starts, counts: (count,) first step and number of steps of each; None: T by T.
        segments: (batch, L) int32, how often another sequence has begun; None: never.
    """

    count: int  # type: ignore[assignment]  # a tuple has a method of this name
    row: int
    firsts: Tensor | None
    ends: Tensor | None
    starts: Tensor | None
    counts: Tensor | None
    segments: Tensor | None


def chunks_of(x: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None, T: int) -> Chunks:
    """Those of T steps of x (batch, L, ...)."""
    batch, length = x.shape[:2]
    segments, row = None, -(-length // T)
    if seq_idx is not None:
        segments = pad(seq_idx.diff(dim=1) != 0, (1, 0)).cumsum(1, dtype=torch.int32)
    if cu_seqlens is None:
        return Chunks(batch * row, row, None, None, None, None, segments)
    sequences = cu_seqlens.shape[0] - 1
    count = length // T + sequences
    bounds = cu_seqlens.long().clamp(0, length)
    begin, steps = bounds[:-1], bounds.diff().clamp_(min=0)
    firsts = begin // T + torch.arange(sequences, device=x.device)
    places = torch.arange(count, device=x.device)
    owner = torch.searchsorted(firsts, places, right=True).sub_(1).clamp_(min=0)
    before = (places - firsts[owner]) * T
    counts = (steps[owner] - before).clamp_(0, T).int()
    return Chunks(count, row, firsts, firsts + (steps + T - 1) // T, begin[owner] + before, counts, segments)


def sequences_of(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many there are."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def precision(on_gpu: bool, dtype: torch.dtype) -> str:
    """Of products for inputs of ``dtype``; float16 multiplies as tf32, which has its digits and does not overflow."""
    if not on_gpu:
        return "widened"
    if torch.version.hip or dtype == torch.bfloat16:
        return "ieee"
    return "tf32" if dtype == torch.float16 else "tf32x3"


def wide(*tensors: Tensor | None) -> bool:
    """Whether all have neighbours along their last axis, in aligned runs of 8."""
    return all(
        t.data_ptr() % 16 == t.shape[-1] % 8 == 0 and t.stride(-1) == 1 and all(step % 8 == 0 for step in t.stride()[:-1])
        for t in tensors
        if t is not None and t.numel()
    )


def dense(tensor: Tensor | None) -> Tensor | None:
    """In float32, contiguous."""
    return None if tensor is None else tensor.float().contiguous()


def strides(tensor: Tensor | None) -> tuple[int, ...]:
    """Of four axes; zero where there is no tensor."""
    return (0, 0, 0, 0) if tensor is None else tensor.stride()
