"""torch's LayerNorm and RMSNorm on the kernels of :mod:`compressm.kernels.norms`: the same arguments and state dicts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compressm.kernels.fused_cpu import layer_norm, layer_norm_mean, rms_norm
from compressm.layers._plain import plain


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm``, fast on CPU where the last axis is short; several axes or no weight run torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., \\*normalized_shape) -> the same shape."""
        if not _taken(self, x):
            return super().forward(x)
        return layer_norm(x, self.weight, self.bias, self.eps)

    def mean_over_time(self, x: Tensor) -> Tensor:
        """``self(x).mean(-2)`` of x (..., L, H) -> (..., H), in one pass where the kernels take the call."""
        if not (_taken(self, x) and plain(self, LayerNorm)):
            return self(x).mean(-2)
        return layer_norm_mean(x, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm``, fast on CPU where the last axis is short; several axes or no weight run torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., \\*normalized_shape) -> the same shape."""
        if not _taken(self, x):
            return super().forward(x)
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if self.eps is None else self.eps
        return rms_norm(x, self.weight, eps)


def _taken(norm: nn.LayerNorm | nn.RMSNorm, x: Tensor) -> bool:
    """Whether the kernels take this call; elsewhere autocast and errors are to be torch's."""
    return x.device.type == "cpu" and norm.weight is not None and len(norm.normalized_shape) == 1
