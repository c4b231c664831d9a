"""The gated delta rule in chunks, in torch's own products: what runs where there is no kernel, and a second witness.

What the steps t of a chunk write, k_t u_t^T, depends on what those before them wrote: (I + N) u = beta (v - (k o E) S), with S
the state in front of the chunk, E the decays since it began and N the strictly lower triangle of beta k_t k_s^T decayed from s
to t.  This is solved for v and for k o E at once; from chunk to chunk only states pass, one a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressm.kernels.gated_delta_rule.reference import Operands, prepare
from compressm.kernels.ssd.reference import in_sequences

CHANNELWISE = 16  # most steps of a chunk where each channel has its decay: all pairs of steps times channels lie in memory


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
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """(o, final states), as the reference's, in chunks of ``chunk`` steps, or fewer where each channel has its decay."""
    operands = prepare(q, k, v, g, beta, initial_state, cu_seqlens, scale, normalize)
    if operands.g.shape[-1] > 1:
        chunk = min(chunk, CHANNELWISE)
    o, last = in_sequences(lambda part, start: _scan(operands.part(part, start), chunk), operands.start, cu_seqlens)
    return o.to(v.dtype), last


def _scan(operands: Operands, chunk: int) -> tuple[Tensor, Tensor]:
    """(o, last state).  A step without a key, a decay and a gain changes no state: the last chunk is filled up with them."""
    length = operands.v.shape[1]
    if length == 0:
        return operands.v, operands.start

    def cut(t: Tensor) -> Tensor:  # (batch, chunks, HV, steps, features)
        return pad(t, (0, 0, 0, 0, 0, -length % chunk)).unflatten(1, (-1, chunk)).transpose(2, 3)

    q, k, v, g, beta = (cut(t) for t in operands[:-1])
    decays = _decays(g)
    within, scores = _scores(k, k, decays).tril(-1), _scores(q, k, decays)
    enter, leave = g.cumsum(-2).exp(), decays[..., -1, :, :]
    right = beta * torch.cat([v, k * enter], -1)
    solved = torch.linalg.solve_triangular(beta * within, right, upper=False, unitriangular=True)
    written, erased = solved.split([v.shape[-1], k.shape[-1]], -1)
    states, writes, state = [], [], operands.start
    rows = (written, erased, (k * leave).mT, enter[..., -1, :].unsqueeze(-1))
    for new, along, out_of, passed in zip(*(t.unbind(1) for t in rows), strict=True):
        states.append(state)
        writes.append(new - along @ state)
        state = passed * state + out_of @ writes[-1]
    o = (q * enter) @ torch.stack(states, 1) + scores @ torch.stack(writes, 1)
    return o.transpose(2, 3).flatten(1, 2)[:, :length], state


def _decays(g: Tensor) -> Tensor:
    """(..., steps t, steps s, features): what is left at t of what step s wrote, from log decays (..., steps, features).

    The logs are summed from s to t alone: differences of sums from the beginning would lose the small among the large.
    """
    count = g.shape[-2]
    steps = torch.arange(count, device=g.device)
    behind = (steps[:, None] > steps)[..., None]
    sums = g.unsqueeze(-2).expand(*g.shape[:-1], count, g.shape[-1]).masked_fill(~behind, 0.0).cumsum(-3)
    return sums.masked_fill((steps[:, None] < steps)[..., None], -torch.inf).exp()


def _scores(q: Tensor, k: Tensor, decays: Tensor) -> Tensor:
    """(..., steps t, steps s): q_t k_s decayed from s to t."""
    if decays.shape[-1] == 1:
        return (q @ k.mT) * decays[..., 0]
    return torch.einsum("...tk,...sk,...tsk->...ts", q, k, decays)
