"""What layers with a convolution and a recurrent state share: prompts, decoding from a cache, packed sequences."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compressm.errors import ArgumentError, bad_argument
from compressm.layers._planned import PlannedLayer
from compressm.layers.mamba_mixer import packing


class MambaLayer(PlannedLayer):
    """(B, L, d_model) -> (B, L, d_model), with mamba_ssm's ways of calling.

    Attributes:
        mixing: of (layer, hidden states, cache or None, cu_seqlens or None), the whole mixer.
        stepping: of (layer, hidden states (B, 1, d_model), conv_state, ssm_state), one token.
    """

    mixing: ClassVar[Callable[..., Tensor]]
    stepping: ClassVar[Callable[..., Tensor]]
    d_model: int
    layer_idx: int | None
    out_proj: nn.Linear
    conv1d: nn.Conv1d
    A_log: nn.Parameter

    @property
    @abstractmethod
    def _state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The sizes of the convolution's and the scan's state of one sequence."""

    def forward(
        self,
        hidden_states: Tensor,
        inference_params: Any = None,
        *,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Run over a sequence.

        Args:
            hidden_states: (B, L, d_model).
            inference_params: None, or an object with ``seqlen_offset`` (tokens already seen) and
                ``key_value_memory_dict``, as in mamba_ssm: at offset 0 the sequence is a prompt whose states are stored under
                ``layer_idx``; behind it the sequence must be one token.
            seq_idx: (B, L) integers that number the sequences which are packed into a row: convolution and state begin anew
                where the number changes.
            cu_seqlens: (sequences + 1,) int32 or int64, the same for a batch of 1: sequence i lies at cu_seqlens[i] to
                cu_seqlens[i + 1].

        Returns:
            (B, L, d_model).

        Raises:
            ArgumentError: shapes do not fit, or packed sequences together with ``inference_params``.
        """
        if not isinstance(hidden_states, Tensor) or not hidden_states.is_floating_point():
            got = f"a tensor of {hidden_states.dtype}" if isinstance(hidden_states, Tensor) else type(hidden_states).__name__
            raise bad_argument("hidden_states", got=got, expected=f"floating point numbers (batch, length, {self.d_model})")
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.d_model:
            got = f"shape {tuple(hidden_states.shape)}"
            raise bad_argument("hidden_states", got=got, expected=f"(batch, length, {self.d_model})")
        if seq_idx is not None or cu_seqlens is not None:
            return self._mix_packed(hidden_states, inference_params, seq_idx, cu_seqlens)
        if inference_params is None:
            return self._mix(hidden_states, None)
        conv_state, ssm_state = self._cached_states(inference_params, hidden_states.shape[0])
        if inference_params.seqlen_offset > 0:
            return self.step(hidden_states, conv_state, ssm_state)[0]
        return self._mix(hidden_states, (conv_state, ssm_state))

    def _mix(self, hidden_states: Tensor, cache: tuple[Tensor, Tensor] | None, cu_seqlens: Tensor | None = None) -> Tensor:
        self.remember(hidden_states, projected=True)
        return self.mixing(hidden_states, cache, cu_seqlens)

    def _mix_packed(
        self, hidden_states: Tensor, inference_params: Any, seq_idx: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        if inference_params is not None:
            raise bad_argument("inference_params", got="states to keep", expected="None with packed sequences")
        if seq_idx is None:
            return self._mix(hidden_states, None, cu_seqlens)
        if cu_seqlens is not None:
            raise bad_argument("seq_idx, cu_seqlens", got="both", expected="one of them")
        if seq_idx.shape != hidden_states.shape[:2] or seq_idx.dtype == torch.bool or seq_idx.is_floating_point():
            got, expected = f"{tuple(seq_idx.shape)} of {seq_idx.dtype}", f"integers {tuple(hidden_states.shape[:2])}"
            raise bad_argument("seq_idx", got=got, expected=expected)
        row = hidden_states.reshape(1, -1, self.d_model)
        return self._mix(row, None, packing(seq_idx)).view_as(hidden_states)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token of inference; both states are advanced in place.

        Args:
            hidden_states: (B, 1, d_model).
            conv_state: (B, channels, d_conv), the last inputs of the convolution, oldest first.
            ssm_state: (B, ..., N), the state of the scan.

        Returns:
            (output (B, 1, d_model), conv_state, ssm_state).
        """
        if hidden_states.dim() != 3 or hidden_states.shape[1:] != (1, self.d_model):
            raise bad_argument(
                "hidden_states", got=f"shape {tuple(hidden_states.shape)}", expected=f"one token, (batch, 1, {self.d_model})"
            )
        self._check_states(hidden_states.shape[0], conv_state, ssm_state)
        return self.stepping(hidden_states, conv_state, ssm_state), conv_state, ssm_state

    def _check_states(self, batch: int, *states: Tensor) -> None:
        for name, state, shape in zip(("conv_state", "ssm_state"), states, self._state_shapes, strict=True):
            if state.shape != (batch, *shape):
                raise bad_argument(name, got=f"shape {tuple(state.shape)}", expected=f"{(batch, *shape)}")

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Zero (conv_state, ssm_state), shapes as in :meth:`step`; ``max_seqlen`` does not matter.

        The scan's state is float32 unless ``dtype`` says otherwise.
        """
        device, (window, state) = self.out_proj.weight.device, self._state_shapes
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        conv_state = torch.zeros(batch_size, *window, device=device, dtype=dtype or self.conv1d.weight.dtype)
        return conv_state, torch.zeros(batch_size, *state, device=device, dtype=dtype or wide)

    def _cached_states(self, inference_params: Any, batch: int) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise ArgumentError("layer_idx: expected a number to keep this layer's states under, got None. Set layer.layer_idx")
        memory = inference_params.key_value_memory_dict
        if self.layer_idx not in memory:
            memory[self.layer_idx] = self.allocate_inference_cache(batch)
        self._check_states(batch, *memory[self.layer_idx])
        return memory[self.layer_idx]
