"""Reference of the short causal convolution and of its decode step: the definition in plain torch.

The oracle of every other form, in any real dtype including float64.  Autograd differentiates it as it stands.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, activation: str | None
) -> Tensor:
    """Output in x's dtype; arguments and shapes as in :func:`compressm.kernels.causal_conv1d`.

    Half precision computes in float32.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    length, width = x.shape[-1], weight.shape[1]
    before = x.new_zeros((*x.shape[:2], width - 1)) if initial_state is None else initial_state
    inputs = torch.cat([before.to(work), x.to(work)], -1)
    taps = weight.to(work)[..., None]
    out = sum(taps[:, k] * inputs[..., k : k + length] for k in range(width))
    if bias is not None:
        out = out + bias.to(work)[:, None]
    return (silu(out) if activation == "silu" else out).to(x.dtype)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """(output, next state); arguments and shapes as in :func:`compressm.kernels.causal_conv1d_update`."""
    work = torch.promote_types(x.dtype, torch.float32)
    inputs = torch.cat([conv_state.to(work), x.to(work)[..., None]], -1)
    out = (inputs[..., -weight.shape[1] :] * weight.to(work)).sum(-1)
    if bias is not None:
        out = out + bias.to(work)
    out = silu(out) if activation == "silu" else out
    return out.to(x.dtype), inputs[..., 1:].to(conv_state.dtype)
