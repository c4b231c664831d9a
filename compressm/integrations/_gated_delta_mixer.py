"""transformers' gated delta rule mixers (Qwen3-Next, Qwen3.5, OLMo-hybrid) on compressm's kernels."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from compressm.integrations._mamba2_mixer import convolved
from compressm.kernels import KernelPlan, plan
from compressm.layers._planned import PlannedLayer
from compressm.layers.gated_delta_mixer import DeltaInputs, finish, layout, project, rule, rule_inputs, rule_step, states
from compressm.layers.mamba_mixer import packing


class AcceleratedGatedDeltaNet(PlannedLayer):
    """In front of a mixer's class: convolution, rule and decode step are ours, parameters and cache the library's."""

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
        length = hidden_states.shape[1]
        self.remember(hidden_states, projected=True)
        conv_state = state = None
        if cache is not None:
            conv_state, state = cache.get_conv_state(mixer.layer_idx), cache.get_recurrent_state(mixer.layer_idx)
        seq_idx = kwargs.get("seq_idx")
        mixed, z, b, a = project(mixer, hidden_states, attention_mask)
        inputs = rule_inputs(mixer, convolved(mixer, mixed, cache, conv_state, seq_idx), b, a)
        if state is not None and length == 1:
            out = rule_step(mixer, inputs, state)
        elif seq_idx is not None:
            row = DeltaInputs(*(part.flatten(0, 1)[None] for part in inputs))
            out = rule(mixer, row, cu_seqlens=packing(seq_idx))[0].view_as(inputs.v)
        else:
            out, last = rule(mixer, inputs, initial_state=state, output_final_state=cache is not None)
            if cache is not None:
                cache.update_recurrent_state(last, layer_idx=mixer.layer_idx)
        return finish(mixer, out.to(hidden_states.dtype), z)

    def plan_for(self, device: str, dtype: torch.dtype, batch: int, length: int) -> KernelPlan:
        sizes = layout(self)
        shapes = {"k": (batch, length, sizes.key_heads, states(self)), "v": (batch, length, sizes.heads, sizes.values)}
        return plan("gated_delta_rule", shapes, dtype, device)


@functools.cache
def accelerated(mixer: type[nn.Module]) -> type[nn.Module]:
    """The class that runs a mixer's class on our kernels."""
    return type(f"Accelerated{mixer.__name__}", (AcceleratedGatedDeltaNet, mixer), {})
