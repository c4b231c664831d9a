"""Reference of the gated delta rule: the definition, one step at a time, in plain torch.

The oracle of every other form, in any real dtype including float64.  Autograd differentiates it as it stands.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compressm.kernels.ssd.reference import first_states, in_sequences, of_heads

EPS = 1e-6  # added to the squared length of a key or a query that is brought to length one


class Operands(NamedTuple):
    """What every form in torch works on, in one dtype, a head of keys for each head of values.

    Attributes:
        q, k: (batch, L, HV, K); q times the scale.
        v: (batch, L, HV, V).
        g: (batch, L, HV, 1 or K).
        beta: (batch, L, HV, 1).
        start: (batch or sequences, HV, K, V).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    start: Tensor

    def part(self, steps: slice, start: Tensor) -> Operands:
        """Some steps, from other states."""
        return Operands(*(t[:, steps] for t in self[:-1]), start)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """(o, final states); arguments and shapes as in :func:`compressm.kernels.gated_delta_rule`.

    Half precision computes in float32.

    Args:
        normalize: q and k are brought to length one.
    """
    operands = prepare(q, k, v, g, beta, initial_state, cu_seqlens, scale, normalize)
    o, last = in_sequences(lambda part, start: _scan(operands.part(part, start)), operands.start, cu_seqlens)
    return o.to(v.dtype), last


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    normalize: bool,
) -> Operands:
    """The operands; arguments as :func:`gated_delta_rule`'s."""
    work = torch.promote_types(v.dtype, torch.float32)
    heads, wide = v.shape[2], v.to(work)
    q, k = (of_heads(unit_length(t.to(work)) if normalize else t.to(work), heads) for t in (q, k))
    g, beta = g.to(work), beta.to(work)
    start = first_states(k, wide, initial_state, cu_seqlens)
    return Operands(q * factor(k, scale), k, wide, g if g.dim() == 4 else g[..., None], beta[..., None], start)


def factor(k: Tensor, scale: float | None) -> float:
    """The scale of queries, K^-0.5 unless there is one."""
    return max(k.shape[-1], 1) ** -0.5 if scale is None else scale


def unit_length(t: Tensor) -> Tensor:
    """t over its length along the last axis, one but for :data:`EPS`."""
    return t * torch.rsqrt(t.square().sum(-1, keepdim=True) + EPS)


def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """(o, new state) of one step: the :class:`Operands` without their axis L."""
    state = state * g.exp().unsqueeze(-1)
    written = beta * (v - (state * k.unsqueeze(-1)).sum(-2))
    state = state + k.unsqueeze(-1) * written.unsqueeze(-2)
    return (state * q.unsqueeze(-1)).sum(-2), state


def _scan(operands: Operands) -> tuple[Tensor, Tensor]:
    state, outputs = operands.start, []
    for row in zip(*(t.unbind(1) for t in operands[:-1]), strict=True):
        o, state = step(state, *row)
        outputs.append(o)
    return torch.stack(outputs, 1) if outputs else operands.v, state


def gated_delta_rule_update(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None, normalize: bool
) -> tuple[Tensor, Tensor]:
    """(o, new state) of one token; arguments as in :func:`compressm.kernels.gated_delta_rule_update`.

    Nothing is written in place.
    """
    work = torch.promote_types(v.dtype, state.dtype)
    q, k, v, g, beta = (t.unsqueeze(1) for t in (q, k, v, g, beta))
    operands = prepare(q, k, v.to(work), g, beta, state, None, scale, normalize)
    o, new = step(operands.start, *(t.squeeze(1) for t in operands[:-1]))
    return o.to(v.dtype), new
