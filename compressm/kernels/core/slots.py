"""Rows of a pool of states that the entries of a batch pick for a decode step, as servers keep the states of many sequences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels.core.custom_op import plain_call

PAD = -1  # the index of an entry that picks no row


def check(name: str, indices: Tensor | None, state: Tensor, batch: int, pad: int) -> None:
    """Raise ArgumentError unless ``indices`` (batch,) are rows of ``state`` (pool, ...), negative or ``pad``.

    The numbers are looked at on CPU tensors only: on a GPU looking would wait for it.
    """
    if indices is None:
        return
    if indices.dim() != 1 or indices.shape[0] != batch or indices.dtype not in (torch.int32, torch.int64):
        got = f"{tuple(indices.shape)} of {indices.dtype}"
        raise bad_argument(name, got=got, expected=f"int32 or int64 ({batch},), one row of the pool for each entry of x")
    if indices.device != state.device:
        raise bad_argument(name, got=f"device {indices.device}", expected=f"{state.device}, where the states are")
    if indices.device.type == "cpu" and plain_call(indices):
        wrong = [row for row in indices.tolist() if row != pad and row >= state.shape[0]]
        if wrong:
            remedy = f"{pad}, as pad_slot_id, stands for none."
            raise bad_argument(name, got=wrong[0], expected=f"rows of a pool of {state.shape[0]}", remedy=remedy)


def check_apart(state: Tensor) -> None:
    """Raise ArgumentError where states share their memory, as those of an expanded tensor do: each is written to."""
    if any(step == 0 and size > 1 for size, step in zip(state.shape, state.stride(), strict=True)):
        got = f"strides {state.stride()}, by which several states share their memory"
        expected, remedy = "memory of its own for every state, which is written to", "contiguous() copies an expanded tensor."
        raise bad_argument("state", got=got, expected=expected, remedy=remedy)


def pick(indices: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """(rows, valid): the rows in int64, zero where an entry picks none, and whether it picks one."""
    valid = (indices != pad) & (indices >= 0)
    return torch.where(valid, indices, 0).long(), valid


def put_(pool: Tensor, rows: Tensor, valid: Tensor, values: Tensor) -> None:
    """pool[rows] = values, in place, for the entries that are valid; differentiable, and of fixed shapes whatever is valid."""
    if rows.shape[0] == 0:
        return
    entries = torch.arange(rows.shape[0], device=rows.device)
    first = valid.int().argmax(keepdim=True)  # what is not valid writes once more what the first valid entry writes
    aside = (-1,) + (1,) * (values.dim() - 1)
    values = torch.where(valid.view(aside), values.to(pool.dtype), pool[rows])
    own = (valid | (entries == first)).view(aside)
    values = torch.where(own, values, values.index_select(0, first).detach())
    pool.index_put_((torch.where(valid, rows, rows.index_select(0, first)),), values)


def through_copies(
    step: Callable[[Tensor], tuple[Tensor, Tensor]], state: Tensor, indices: Tensor, targets: Tensor | None, pad: int
) -> Tensor:
    """A decode step on copies of the rows that ``indices`` pick, written back to those of ``targets`` (None: the same).

    Args:
        step: of the picked rows, to (output, new rows).

    Returns:
        the output, zero for entries that pick no row.
    """
    rows, valid = pick(indices, pad)
    out, new = step(state[rows])
    out = torch.where(valid.view((-1,) + (1,) * (out.dim() - 1)), out, 0.0)
    if targets is not None:
        rows, written = pick(targets, pad)
        valid = valid & written
    put_(state, rows, valid, new)
    return out
