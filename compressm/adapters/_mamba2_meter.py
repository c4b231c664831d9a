"""What the scans of Mamba-2 layers are given on calibration data, and their states at some of the steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters._state_meter import Advance, StateMeter
from compressm.layers.mamba2_mixer import ScanInputs, limits, read
from compressm.layers.mamba_mixer import decay


class Mamba2Meter(StateMeter):
    """E[B B^T] and E[C C^T] over all tokens, E[z z^T] and single second moments of the states over evenly spaced steps."""

    letters = ("E[B B^T]", "E[C C^T]")
    part = "in_proj"
    projected: Tensor | None = None  # what it gave in the call that now runs

    def part_output(self, output: Any) -> None:
        self.projected = output.detach() if isinstance(output, Tensor) and not self.replaying else None

    def read(self, module: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Advance]:
        projected, self.projected = self.projected, None
        if projected is not None and (projected.shape[:-1] != hidden.shape[:-1] or projected.dtype != hidden.dtype):
            projected = None  # of rows in another order, or rounded by autocast
        inputs, dt = read(module, hidden, kwargs.get("attention_mask"), projected)
        x, log_decays = _stepped(module, inputs.x, dt)

        def advance(state: Tensor | None, part: slice) -> Tensor:
            state = _initial(module, inputs) if state is None else state
            _advance(x[:, part], inputs.B[:, part], log_decays[:, part], state)
            return state

        return inputs.B, inputs.C, advance


def _initial(module: nn.Module, inputs: ScanInputs) -> Tensor:
    """The states (batch, H, P, N) in front of a sequence, zero where a layer does not learn them."""
    states, (batch, _, heads, channels) = module._parameters.get("init_states"), inputs.x.shape
    zero = inputs.B.new_zeros(heads, channels, inputs.B.shape[-1], dtype=_wide(inputs.B))
    return (zero if states is None else states.to(zero)).repeat(batch, 1, 1, 1)


def _stepped(module: nn.Module, x: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """dt x (batch, L, H, P), and dt A (batch, L, H)."""
    bias: Any = module.dt_bias
    steps = F.softplus(dt.to(_wide(dt)) + bias).clamp(*limits(module))
    return x * steps[..., None], steps * decay(module)


def _advance(x: Tensor, B: Tensor, log_decays: Tensor, state: Tensor) -> None:
    """Take the states (batch, H, P, N), in place, over some of the steps; the other arguments are (batch, steps, ...)."""
    after = log_decays.flip(1).cumsum(1).flip(1)  # decay of a step and those behind it
    x = x * torch.exp(after - log_decays)[..., None]
    rows = x.unflatten(2, (B.shape[2], -1)).flatten(3).permute(0, 2, 3, 1).flatten(0, 1)
    state *= torch.exp(after[:, 0])[..., None, None]
    state.view(len(rows), -1, B.shape[-1]).baddbmm_(rows, B.to(x.dtype).transpose(1, 2).flatten(0, 1))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
