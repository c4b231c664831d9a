"""A Mamba-1 mixer as one op, for every module that keeps its parameters under mamba_ssm's names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compressm.kernels._mamba_mixer_cpu import mamba_mixer
from compressm.layers._plain import plain


def whole_mixer(layer: nn.Module, hidden_states: Tensor) -> Tensor | None:
    """The mixer from a zero state on hidden_states (B, L, d_model) -> (B, L, d_model), by one op.

    None where its steps have to run one by one: the op cannot run (see :func:`mamba_mixer`), or a projection is more than its
    weight and bias.
    """
    in_proj, x_proj, dt_proj, out_proj = projections = layer.in_proj, layer.x_proj, layer.dt_proj, layer.out_proj
    if hidden_states.device.type != "cpu" or not all(plain(projection, nn.Linear) for projection in projections):
        return None
    return mamba_mixer(
        hidden_states, in_proj.weight, in_proj.bias, layer.conv1d.weight, layer.conv1d.bias, x_proj.weight, dt_proj.weight,
        dt_proj.bias, layer.A_log, layer.D, out_proj.weight, out_proj.bias,
    )  # fmt: skip


def working_dtype(hidden_states: Tensor) -> torch.dtype:
    """That of the projections, which autocast may choose."""
    device, dtype = hidden_states.device.type, hidden_states.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and dtype != torch.float64 else dtype
