"""transformers' Mamba-2 mixers on compressm's kernels."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from compressm.kernels import KernelPlan, plan, ssd
from compressm.layers._planned import PlannedLayer
from compressm.layers.mamba2_mixer import gate, layout, limits, normed, project, scan_inputs, scan_step, states, without_padding
from compressm.layers.mamba_mixer import convolve, convolve_step, decay


class AcceleratedMamba2Mixer(PlannedLayer):
    """In front of a mixer's class: convolution, scan and decode step are ours, parameters and cache the library's."""

    takes_maps = True

    def forward(self, hidden_states: Tensor, cache: Any = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Run over a sequence, or over its continuation.

        Args:
            hidden_states: (B, L, hidden_size).
            cache: the model's cache; without earlier tokens in it the sequence is a prompt.
            attention_mask: (B, L), zero where a token is padding; None: no padding.
            kwargs: ``seq_idx`` (B, L) numbers the sequences that are packed into a row; others do not matter.

        Returns:
            (B, L, hidden_size).
        """
        mixer: Any = self
        sizes, length = layout(mixer), hidden_states.shape[1]
        self.remember(hidden_states, projected=True)
        conv_state = state = None
        if cache is not None:
            conv_state, state = cache.get_conv_state(mixer.layer_idx), cache.get_recurrent_state(mixer.layer_idx)
        seq_idx = kwargs.get("seq_idx")
        z, xBC, dt = project(mixer, hidden_states, attention_mask)
        xBC = convolved(mixer, xBC, cache, conv_state, seq_idx)
        inputs = scan_inputs(mixer, without_padding(xBC, attention_mask), sizes)
        y: Any
        if state is not None and length == 1:
            one = type(inputs)(*(part[:, 0] for part in inputs))
            y = scan_step(mixer, one, dt[:, 0], gate(mixer, z[:, 0], sizes), state)[:, None]
        else:
            y = ssd(
                inputs.x, dt, decay(mixer), inputs.B, inputs.C, None, mixer.D, gate(mixer, z, sizes), mixer.dt_bias, state,
                seq_idx, dt_softplus=True, dt_limit=limits(mixer), return_final_states=cache is not None,
            )  # fmt: skip
            if cache is not None:
                y, last = y
                cache.update_recurrent_state(last, layer_idx=mixer.layer_idx)
        y = y.flatten(-2)
        return mixer.out_proj((mixer.norm(y, z) if normed(mixer) else y).to(hidden_states.dtype))

    def plan_for(self, device: str, dtype: torch.dtype, batch: int, length: int) -> KernelPlan:
        sizes = layout(self)
        x = batch, length, sizes.heads, sizes.headdim
        return plan("ssd", {"x": x, "B": (batch, length, sizes.groups, states(self))}, dtype, device)


def convolved(mixer: Any, x: Tensor, cache: Any, conv_state: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """silu(causal convolution) of x (B, L, channels) behind what the library's cache remembers, which is written.

    Args:
        cache: None: there is nothing in front.
        conv_state: what it remembers, or None.
        seq_idx: (B, L) numbers of packed sequences, or None.
    """
    length = x.shape[1]
    if conv_state is not None and length == 1 and not cache.is_recording_past(mixer.layer_idx):
        return convolve_step(mixer, x[:, 0], conv_state)[:, None]
    if cache is None:
        return convolve(mixer, x.mT, seq_idx=seq_idx).mT
    inputs = cache.update_conv_state(x.mT, mixer.layer_idx, conv_kernel_size=mixer.conv_kernel_size)
    if seq_idx is not None:
        inputs = inputs[..., -length:]
    return convolve(mixer, inputs, seq_idx=seq_idx)[..., -length:].mT


@functools.cache
def accelerated(mixer: type[nn.Module]) -> type[nn.Module]:
    """The class that runs a mixer's class on our kernels."""
    return type(f"Accelerated{mixer.__name__}", (AcceleratedMamba2Mixer, mixer), {})
