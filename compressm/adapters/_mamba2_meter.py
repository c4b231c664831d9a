"""What the scans of Mamba-2 layers are given on calibration data, and their states at some of the steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from compressm.adapters._state_meter import Advance, StateMeter
from compressm.kernels import ssd
from compressm.layers.mamba2_mixer import limits, read
from compressm.layers.mamba_mixer import decay


class Mamba2Meter(StateMeter):
    """E[B B^T] and E[C C^T] over all tokens, E[z z^T] and single second moments of the states over evenly spaced steps."""

    letters = ("E[B B^T]", "E[C C^T]")

    def read(self, module: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Advance]:
        inputs, dt = read(module, hidden, kwargs.get("attention_mask"))
        bias: Any = module.dt_bias
        learned = module._parameters.get("init_states")

        def advance(state: Tensor | None, part: slice) -> Tensor:
            if state is None and learned is not None:
                state = learned.expand(len(dt), *learned.shape)
            x, B, C = (tensor[:, part] for tensor in inputs)
            _, state = ssd(
                x, dt[:, part], decay(module), B, C, dt_bias=bias, initial_states=state, dt_softplus=True,
                dt_limit=limits(module), return_final_states=True,
            )  # fmt: skip
            return state

        return inputs.B, inputs.C, advance
