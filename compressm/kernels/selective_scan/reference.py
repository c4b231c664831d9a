"""Reference of the selective scan and of its decode step: the definition, one step at a time, in plain torch.

The oracle of every other form, in any real dtype including float64.  Autograd differentiates it as it stands.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

EXACT = 40.0  # softplus(x) and x are equal in float64 from here on


def step_sizes(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool, work: torch.dtype) -> Tensor:
    """Step sizes dt of delta (batch, D, ...) in dtype ``work``: softplus(delta + delta_bias), either part optional."""
    dt = delta.to(work)
    if delta_bias is not None:
        dt = dt + delta_bias.to(work).reshape(-1, *[1] * (delta.dim() - 2))
    return softplus(dt, threshold=EXACT) if delta_softplus else dt


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """(out, last state); arguments and shapes as in :func:`compressm.kernels.selective_scan`.

    B and C are (batch, G, N, L) or constant (D, N).  Half precision computes in float32.
    """
    work = torch.promote_types(u.dtype, torch.float32)
    dt = step_sizes(delta, delta_bias, delta_softplus, work)
    x, A, B, C = u.to(work), A.to(work), B.to(work), C.to(work)
    if cu_seqlens is None:
        start = u.new_zeros((*u.shape[:2], A.shape[1]), dtype=work) if initial_state is None else initial_state.to(work)
        y, last = _scan(x, dt, A, B, C, start)
    else:
        bounds = cu_seqlens.tolist()
        start = u.new_zeros((len(bounds) - 1, *A.shape), dtype=work) if initial_state is None else initial_state.to(work)
        parts = []
        for sequence, (first, stop) in enumerate(itertools.pairwise(bounds)):
            B_own, C_own = (t if t.dim() == 2 else t[..., first:stop] for t in (B, C))
            own = start[sequence : sequence + 1]
            parts.append(_scan(x[..., first:stop], dt[..., first:stop], A, B_own, C_own, own))
        y, last = torch.cat([part[0] for part in parts], -1), torch.cat([part[1] for part in parts])
    if D is not None:
        y = y + D.to(work)[:, None] * x
    if z is not None:
        y = y * silu(z.to(work))
    return y.to(u.dtype), last


def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """y_t = C_t h_t with h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t for (batch, D, L) inputs; (y, last state)."""
    _batch, channels, length = x.shape
    groups = next((t.shape[1] for t in (B, C) if t.dim() == 4), 1)
    split = (groups, channels // groups)
    A, h = A.unflatten(0, split), h.unflatten(1, split)
    gains = dt.unflatten(1, split).unbind(-1)
    drive = (dt * x).unflatten(1, split).unbind(-1)
    B_steps, C_steps = (
        [t.unflatten(0, split)] * length if t.dim() == 2 else t.unsqueeze(2).unbind(-1) for t in (B, C)
    )
    outputs = []
    for t in range(length):
        h = torch.exp(gains[t].unsqueeze(-1) * A) * h + drive[t].unsqueeze(-1) * B_steps[t]
        outputs.append((h * C_steps[t]).sum(-1))
    y = torch.stack(outputs, -1).flatten(1, 2) if outputs else x
    return y, h.flatten(1, 2)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """(out, new state) of one step; with heads: state (batch, H, P, N), B and C (batch, G, N), all else accordingly.

    Nothing is written in place.
    """
    work = torch.promote_types(torch.promote_types(x.dtype, state.dtype), torch.float32)
    gain = dt.to(work) if dt_bias is None else dt.to(work) + dt_bias.to(work)
    gain = softplus(gain, threshold=EXACT) if dt_softplus else gain
    wide = [t.to(work).repeat_interleave(x.shape[1] // t.shape[1], 1).unsqueeze(2) for t in (B, C)]
    new = torch.exp(gain.unsqueeze(-1) * A.to(work)) * state.to(work)
    new = new + (gain * x.to(work)).unsqueeze(-1) * wide[0]
    y = (new * wide[1]).sum(-1)
    if D is not None:
        y = y + D.to(work) * x.to(work)
    if z is not None:
        y = y * silu(z.to(work))
    return y.to(x.dtype), new
