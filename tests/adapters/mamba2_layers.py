"""Mamba-2 layers and hidden states for them."""

from __future__ import annotations

import torch

from compressm.layers import Mamba2


def lively(d_state=6, dtype=torch.float64, seed=0, **options):
    """A layer whose scan matters: larger steps than at initialisation, no skip."""
    torch.manual_seed(seed)
    layer = Mamba2(8, **{"d_state": d_state, "headdim": 4, "ngroups": 2, **options}).to(dtype)
    with torch.no_grad():
        layer.dt_bias.add_(2.0)
        layer.A_log.sub_(1.5)
        layer.D.zero_()
        for name, value in layer.named_parameters():
            if name.startswith(("in_proj", "conv1d")):
                value.normal_()
            elif name.endswith("_map"):
                value.add_(0.2 * torch.randn_like(value))
    return layer


def data(*shape, seed=1):
    return torch.randn(*shape, 8, generator=torch.Generator().manual_seed(seed)).double()
