"""Reference of the short causal convolution and of its decode step: the definition in plain torch.

The oracle of every other form, in any real dtype including float64, on any device and for any width.  Autograd differentiates
it as it stands.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: bool,
) -> Tensor:
    """Output in x's dtype; arguments and shapes as in :func:`compressm.kernels.causal_conv1d`.

    Half precision computes in float32.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    length, width = x.shape[-1], weight.shape[1]
    before = initial_states if cu_seqlens is None else None
    before = x.new_zeros((*x.shape[:2], width - 1)) if before is None else before
    inputs = torch.cat([before.to(work), x.to(work)], -1)
    if cu_seqlens is not None:
        steps = torch.arange(length, device=x.device)
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), steps.to(cu_seqlens.dtype), right=True)
        seq_idx = sequence[None]
    taps, out = weight.to(work)[..., None], torch.zeros((), dtype=work, device=x.device)
    for k in range(width):
        seen, back = inputs[..., k : k + length], width - 1 - k
        if seq_idx is not None and back > 0:
            front: Tensor | float = 0.0
            if cu_seqlens is not None and initial_states is not None:
                place = (steps - cu_seqlens[sequence] + k).clamp(max=width - 2)
                front = initial_states.mT[sequence, place].mT.to(work)
            earlier = torch.cat([seq_idx.new_full((seq_idx.shape[0], back), -1), seq_idx], -1)[:, :length]
            seen = torch.where((earlier == seq_idx)[:, None], seen, front)
        out = out + taps[:, k] * seen
    if bias is not None:
        out = out + bias.to(work)[:, None]
    out = silu(out) if activation else out
    if seq_idx is not None:
        out = torch.where((seq_idx >= 0)[:, None], out, 0.0)
    return out.to(x.dtype)


def final_states(x: Tensor, initial_states: Tensor | None, cu_seqlens: Tensor | None, count: int) -> Tensor:
    """The last ``count`` inputs of every sequence, (sequences, D, count) in x's dtype, with zeros or its state in front."""
    length, channels = x.shape[-1], x.shape[1]
    first: Tensor | int
    last: Tensor | int
    if cu_seqlens is None:
        first, last, sequences = 0, length, x.shape[0]
    else:
        first, last, sequences = cu_seqlens[:-1, None], cu_seqlens[1:, None], cu_seqlens.shape[0] - 1
    steps = torch.arange(count, device=x.device) - count + last
    if initial_states is None:
        before = x.new_zeros((sequences, channels, count))
    else:
        place = (steps - first + count).clamp(max=count - 1).expand(sequences, count)
        before = initial_states.to(x.dtype).gather(-1, place[:, None].expand(-1, channels, -1))
    if length == 0:
        return before
    taken = x[..., steps.clamp(min=0)] if cu_seqlens is None else x[0][:, steps.clamp(min=0)].transpose(0, 1)
    inside = steps >= first
    return torch.where(inside if cu_seqlens is None else inside[:, None], taken, before)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: bool, cache_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(output, next state); shapes as in :func:`compressm.kernels.causal_conv1d_update`, with x (batch, D, steps).

    Nothing is written in place.
    """
    steps, width, held = x.shape[-1], weight.shape[1], conv_state.shape[-1]
    if cache_seqlens is None or held == 0:
        window = conv_state[..., held - (width - 1) :]
        state = torch.cat([conv_state, x.to(conv_state.dtype)], -1)[..., steps:]
    else:
        place = torch.arange(1 - width, 0, device=x.device) + cache_seqlens[:, None]
        window = conv_state.gather(-1, _circular(place, conv_state))
        kept = min(steps, held)  # of more steps than the buffer has places the last ones stay
        place = torch.arange(steps - kept, steps, device=x.device) + cache_seqlens[:, None]
        state = conv_state.scatter(-1, _circular(place, conv_state), x[..., steps - kept :].to(conv_state.dtype))
    work = torch.promote_types(x.dtype, torch.float32)
    inputs = torch.cat([window.to(work), x.to(work)], -1)
    taps = weight.to(work)[..., None]
    out = torch.stack([taps[:, k] * inputs[..., k : k + steps] for k in range(width)]).sum(0)
    if bias is not None:
        out = out + bias.to(work)[:, None]
    return (silu(out) if activation else out).to(x.dtype), state


def _circular(place: Tensor, conv_state: Tensor) -> Tensor:
    """Places (batch, k) of a circular buffer, for all channels."""
    return (place.long() % conv_state.shape[-1])[:, None].expand(-1, conv_state.shape[1], -1)
