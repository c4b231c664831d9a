"""Reference of Mamba-2's scan: the definition, one step at a time, in plain torch.

The oracle of every other form, in any real dtype including float64.  Autograd differentiates it as it stands.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

EXACT = 40.0  # softplus(x) and x are equal in float64 from here on


def step_sizes(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, low: float, high: float, work: torch.dtype
) -> Tensor:
    """Step sizes (batch, L, H) in dtype ``work``: dt + dt_bias, or softplus of it, no less than low and no more than high."""
    step = dt.to(work) if dt_bias is None else dt.to(work) + dt_bias.to(work)
    return (softplus(step, threshold=EXACT) if dt_softplus else step).clamp(low, high)


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
) -> tuple[Tensor, Tensor]:
    """(out, final states); arguments and shapes as in :func:`compressm.kernels.ssd`, dt_limit as (low, high).

    scaled: the step sizes scale what is written; else they only decay.  Half precision computes in float32.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    step = step_sizes(dt, dt_bias, dt_softplus, low, high, work)
    wide, A = x.to(work), A.to(work)
    drive = step[..., None] * wide if scaled else wide
    B, C = (of_heads(t.to(work), x.shape[2]) for t in (B, C))
    start = first_states(x, B, initial_states, cu_seqlens)

    def scan(part: slice, h: Tensor) -> tuple[Tensor, Tensor]:
        fresh = None if seq_idx is None else seq_idx[:, part].diff(dim=1) != 0
        return _scan(drive[:, part], step[:, part], A, B[:, part], C[:, part], h, fresh)

    y, last = in_sequences(scan, start, cu_seqlens)
    return skip_and_gate(y, wide, D, z).to(x.dtype), last


def of_heads(t: Tensor, heads: int) -> Tensor:
    """(batch, L, H, N) of (batch, L, G, N): what each head reads."""
    return t.repeat_interleave(heads // t.shape[2], 2)


def first_states(x: Tensor, B: Tensor, initial_states: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The states in front of the first steps, in B's dtype."""
    if initial_states is not None:
        return initial_states.to(B.dtype)
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return B.new_zeros((sequences, *x.shape[2:], B.shape[3]))


def in_sequences(scan, start: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y, final states) of ``scan(steps, states in front of them)``, over all steps or over each packed sequence."""
    if cu_seqlens is None:
        return scan(slice(None), start)
    bounds = itertools.pairwise(cu_seqlens.tolist())
    parts = [scan(slice(first, stop), start[i : i + 1]) for i, (first, stop) in enumerate(bounds)]
    return torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts])


def skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """(y + D x) silu(z)."""
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]).to(y.dtype) * x
    return y if z is None else y * silu(z.to(y.dtype))


def _scan(
    drive: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, fresh: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(y, last state); fresh (batch, L - 1): whether a sequence begins with the step behind."""
    decays, drives = torch.exp(step * A)[..., None, None].unbind(1), drive.unbind(1)
    B_steps, C_steps = B.unbind(1), C.unbind(1)
    outputs = []
    for t in range(drive.shape[1]):
        if fresh is not None and t > 0:
            h = torch.where(fresh[:, t - 1, None, None, None], 0.0, h)
        h = decays[t] * h + drives[t].unsqueeze(-1) * B_steps[t].unsqueeze(-2)
        outputs.append((h * C_steps[t].unsqueeze(-2)).sum(-1))
    return torch.stack(outputs, 1) if outputs else drive, h
