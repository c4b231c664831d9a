"""Mamba-2's scan in chunks, in torch's own matrix products: what runs where there is no kernel, and a second witness.

Within a chunk y = (C B^T o M) x, M the decays from step to step; between chunks only states pass, one a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressm.kernels.ssd.reference import first_states, in_sequences, of_heads, skip_and_gate, step_sizes

NOTHING_LEFT = -200.0  # a log decay of which float32 keeps nothing; in sums with stronger ones the small ones would drown


def ssd(
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
    dt_softplus: bool,
    low: float,
    high: float,
    scaled: bool,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """(out, final states), as the reference's, in chunks of ``chunk`` steps."""
    work = torch.promote_types(x.dtype, torch.float32)
    step = step_sizes(dt, dt_bias, dt_softplus, low, high, work)
    wide, A, B, C = x.to(work), A.to(work), B.to(work), C.to(work)
    drive = step[..., None] * wide if scaled else wide
    start = first_states(x, B, initial_states, cu_seqlens)

    def scan(part: slice, h: Tensor) -> tuple[Tensor, Tensor]:
        sequence = None if seq_idx is None else seq_idx[:, part]
        return _scan(drive[:, part], step[:, part], A, B[:, part], C[:, part], h, sequence, chunk)

    y, last = in_sequences(scan, start, cu_seqlens)
    return skip_and_gate(y, wide, D, z).to(x.dtype), last


def _scan(
    drive: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, sequence: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """(y, last state).  A step of size zero changes no state: the last chunk is filled up with them."""
    length = drive.shape[1]
    if length == 0:
        return drive, h
    missing = -length % chunk

    def cut(t: Tensor) -> Tensor:
        filled = pad(t, (*[0, 0] * (t.dim() - 2), 0, missing)) if missing else t
        return filled.unflatten(1, (-1, chunk))

    heads = drive.shape[2]
    u, decay = cut(drive), cut((step * A).clamp(min=NOTHING_LEFT)).cumsum(2)
    steps = torch.arange(chunk, device=drive.device)
    within = (steps[:, None] >= steps)[..., None]
    enters = leaves = passes = None  # whether the state in front reaches a step, a step the state behind, the one the other
    if sequence is not None:
        filled = torch.cat([sequence, sequence[:, -1:].expand(-1, missing)], 1).unflatten(1, (-1, chunk))
        before = torch.cat([filled[:, :1, 0], filled[:, :-1, -1]], 1)[..., None]
        within = within & (filled.unsqueeze(3) == filled.unsqueeze(2))[..., None]
        enters, leaves = (filled == before)[..., None], (filled == filled[..., -1:])[..., None]
        passes = enters[:, :, -1]
    keys, queries = cut(B), cut(C)
    differences = decay.unsqueeze(3) - decay.unsqueeze(2)
    mask = differences.masked_fill(~within, -torch.inf).exp()
    scores = torch.einsum("bctgn,bcsgn->bctsg", queries, keys).repeat_interleave(heads // B.shape[2], -1)
    y = torch.einsum("bctsh,bcshp->bcthp", scores * mask, u)
    written = _kept((decay[:, :, -1:] - decay).exp(), leaves)[..., None] * u
    added = torch.einsum("bcshp,bcshn->bchpn", written, of_heads(keys.flatten(0, 1), heads).unflatten(0, keys.shape[:2]))
    states = []
    for passed, new in zip(_kept(decay[:, :, -1].exp(), passes)[..., None, None].unbind(1), added.unbind(1), strict=True):
        states.append(h)
        h = passed * h + new
    read = of_heads(queries.flatten(0, 1), heads).unflatten(0, queries.shape[:2])
    y = y + torch.einsum("bcthn,bchpn->bcthp", _kept(decay.exp(), enters)[..., None] * read, torch.stack(states, 1))
    return y.flatten(1, 2)[:, :length], h


def _kept(factor: Tensor, mask: Tensor | None) -> Tensor:
    return factor if mask is None else torch.where(mask, factor, 0.0)
