"""The gated RMS norm at the end of a Mamba-2 layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GatedRMSNorm(nn.Module):
    """RMS norm over groups of channels with a SiLU gate in front of it or behind it; mamba_ssm calls it RMSNormGated.

    Args:
        channels: length of the last axis.
        groups: how many groups of neighbouring channels are normalised on their own.
        eps: added to the mean square.
        norm_before_gate: the gate is behind the norm and its weight.
        device, dtype: of the parameter.

    Parameter: ``weight`` (channels,).
    """

    def __init__(
        self,
        channels: int,
        groups: int = 1,
        eps: float = 1e-5,
        norm_before_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.groups, self.eps, self.norm_before_gate = groups, eps, norm_before_gate
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All weights are one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x and gate z (..., channels) -> the same shape, in x's dtype; computed in float32 at least."""
        return gated_rms_norm(x, z, self.weight, self.groups, self.eps, self.norm_before_gate)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, groups={self.groups}, eps={self.eps}, norm_before_gate={self.norm_before_gate}"


def gated_rms_norm(
    x: Tensor, z: Tensor | None, weight: Tensor, groups: int, eps: float, norm_before_gate: bool = False
) -> Tensor:
    """The norm of :class:`GatedRMSNorm` with a weight (channels,); without a gate where z is None."""
    wide, size = torch.promote_types(x.dtype, torch.float32), x.shape[-1] // groups
    y = x.to(wide)
    gate = None if z is None else F.silu(z.to(wide))
    if gate is not None and not norm_before_gate:
        y = y * gate
    y = F.rms_norm(y.unflatten(-1, (groups, size)), (size,), eps=eps).flatten(-2) * weight.to(wide)
    return (y * gate if gate is not None and norm_before_gate else y).to(x.dtype)
