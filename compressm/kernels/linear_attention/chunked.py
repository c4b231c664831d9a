"""Linear attention with decays of key channels in chunks, in torch's own matrix products: where there is no kernel.

A chunk is halved again and again.  What the second half of a block reads of the first has decayed over the border between
them: from the step that wrote to the border, and from there to the step that reads.  Both are sums of log decays, none of them
positive, so that nothing is ever divided by a decay, however strong.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressm.kernels.linear_attention.reference import prepared
from compressm.kernels.ssd.reference import in_sequences


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """(out, final states), as the reference's, in chunks of ``chunk`` steps, or of the next power of two."""
    q, k, wide, g, start = prepared(q, k, v, g, initial_state, cu_seqlens)
    steps = 1 << (chunk - 1).bit_length()

    def scan(part: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        return _scan(q[:, part], k[:, part], wide[:, part], g[:, part], state, steps)

    out, last = in_sequences(scan, start, cu_seqlens)
    return (scale * out).to(v.dtype), last


def _scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """(out, last state).  A step of zero keys that does not decay changes no state: the last chunk is filled up with them."""
    length = v.shape[1]
    if length == 0:
        return v, state

    def cut(t: Tensor) -> Tensor:
        """(batch, chunks, heads, steps, width)"""
        return pad(t, (0, 0, 0, 0, 0, -length % chunk)).unflatten(1, (-1, chunk)).transpose(2, 3)

    q, k, v, g = (cut(t) for t in (q, k, v, g))
    out = (q * k).sum(-1, keepdim=True) * v
    half = chunk // 2
    while half:
        out = out + _across(q, k, v, g, half)
        half //= 2
    added, passed = (k * _behind(g).exp()).mT @ v, g.sum(-2).exp().unsqueeze(-1)
    states = []
    for kept, new in zip(passed.unbind(1), added.unbind(1), strict=True):
        states.append(state)
        state = kept * state + new
    out = out + (q * g.cumsum(-2).exp()) @ torch.stack(states, 1)
    return out.transpose(2, 3).flatten(1, 2)[:, :length], state


def _across(q: Tensor, k: Tensor, v: Tensor, g: Tensor, half: int) -> Tensor:
    """What the second halves of blocks of two times ``half`` steps read of the first."""
    (_, reads), (keys, _), (values, _), (front, back) = (t.unflatten(-2, (-1, 2, half)).unbind(-3) for t in (q, k, v, g))
    scores = (reads * back.cumsum(-2).exp()) @ (keys * _behind(front).exp()).mT
    later = scores @ values
    return torch.stack([torch.zeros_like(later), later], -3).flatten(-4, -2)


def _behind(g: Tensor) -> Tensor:
    """For every step the sum over those behind it."""
    return pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)
