"""Reference of linear attention with decays of key channels: the definition, one step at a time, in plain torch.

The oracle of every other form, in any real dtype including float64.  Autograd differentiates it as it stands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.kernels.ssd.reference import in_sequences, of_heads


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, final states); arguments and shapes as in :func:`compressm.kernels.linear_attention`, g (batch, L, HV, K).

    Half precision computes in float32.
    """
    q, k, wide, g, start = prepared(q, k, v, g, initial_state, cu_seqlens)

    def scan(part: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        return _scan(q[:, part], k[:, part], wide[:, part], g[:, part], state)

    out, last = in_sequences(scan, start, cu_seqlens)
    return (scale * out).to(v.dtype), last


def prepared(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and g with HV heads, and the states in front of the first steps, float32 at least."""
    work = torch.promote_types(v.dtype, torch.float32)
    heads, values = v.shape[2:]
    q, k = (of_heads(t.to(work), heads) for t in (q, k))
    if initial_state is None:
        sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        start = q.new_zeros((sequences, heads, q.shape[3], values))
    else:
        start = initial_state.to(work)
    return q, k, v.to(work), g.to(work), start


def _scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """(out, last state)"""
    outputs = []
    for query, key, value, decay in zip(q.unbind(1), k.unbind(1), v.unbind(1), g.exp().unbind(1), strict=True):
        state = decay.unsqueeze(-1) * state + key.unsqueeze(-1) * value.unsqueeze(-2)
        outputs.append((query.unsqueeze(-1) * state).sum(-2))
    return torch.stack(outputs, 1) if outputs else v, state
