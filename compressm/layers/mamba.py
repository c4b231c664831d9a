"""Mamba, the selective state-space layer (Gu and Dao 2023, arXiv 2312.00752)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from compressm.errors import ArgumentError, bad_argument
from compressm.kernels import KernelPlan, plan
from compressm.layers.mamba_mixer import mix, packing, step, working_dtype
from compressm.layers.step_sizes import StepSizes


class Mamba(nn.Module):
    """The Mamba-1 mixer: (B, L, d_model) -> (B, L, d_model).

    Constructor, parameter names, shapes, initialisation and inference methods are those of ``mamba_ssm.Mamba``; checkpoints
    of it, and the mixers of transformers' Mamba models, load as they are.  There is no upper limit on the states, and it
    runs on CPU and GPU without ``causal-conv1d``.

    Args:
        d_model: channels in and out.
        d_state: states N per inner channel.
        d_conv: taps of the causal convolution; compiled kernels have up to 8.
        expand: inner channels are ``expand * d_model``.
        dt_rank: rank of the step sizes' projection; ``"auto"``: ceil(d_model / 16).
        dt_min, dt_max: range of the initial step sizes, drawn log-uniformly.
        dt_init: ``"random"`` or ``"constant"`` initial weights of ``dt_proj``, of scale ``dt_scale / sqrt(dt_rank)``.
        dt_scale: see ``dt_init``.
        dt_init_floor: least initial step size.
        conv_bias, bias: whether the convolution, and the projections in and out, have a bias.
        use_fast_path: taken for mamba_ssm's sake; there is one path.
        layer_idx: key of this layer in ``inference_params.key_value_memory_dict``.
        device, dtype: of the parameters; ``A_log`` and ``D`` are kept in float32.

    Parameters (d_inner channels, R = dt_rank): ``in_proj.weight`` (2 d_inner, d_model), ``conv1d.weight`` (d_inner, 1, d_conv),
    ``conv1d.bias``, ``x_proj.weight`` (R + 2N, d_inner), ``dt_proj.weight`` (d_inner, R), ``dt_proj.bias``, ``A_log``
    (d_inner, N), ``D`` (d_inner,), ``out_proj.weight`` (d_model, d_inner).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise bad_argument(name, got=repr(value), expected="a positive integer")
        if int(expand * d_model) < 1:
            raise bad_argument("expand", got=expand, expected="a number such that expand * d_model is at least 1")
        if dt_rank != "auto" and (isinstance(dt_rank, bool) or not isinstance(dt_rank, int) or dt_rank < 1):
            raise bad_argument("dt_rank", got=repr(dt_rank), expected="a positive integer or 'auto'")
        if dt_init not in ("random", "constant"):
            raise bad_argument("dt_init", got=repr(dt_init), expected="'random' or 'constant'")
        if not 0 < dt_min <= dt_max:
            raise bad_argument("dt_min, dt_max", got=(dt_min, dt_max), expected="0 < dt_min <= dt_max")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.d_conv, self.expand = d_model, d_conv, expand
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.d_inner = int(expand * d_model)
        self.dt_rank = dt_rank if isinstance(dt_rank, int) else math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **options)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **options
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **options)
        self.dt_proj = StepSizes(
            self.dt_rank, self.d_inner, dt_min=dt_min, dt_max=dt_max, dt_init=dt_init, dt_scale=dt_scale,
            dt_init_floor=dt_init_floor, **options,
        )  # fmt: skip
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state, dtype=torch.float32, device=device))
        self.D = nn.Parameter(torch.empty(self.d_inner, dtype=torch.float32, device=device))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **options)
        self._init_scan()
        self._last_call: tuple[str, torch.dtype, int, int] | None = None  # device type, dtype, batch and length of the input

    @torch.no_grad()
    def _init_scan(self) -> None:
        """A = -1, -2, ..., -N in every channel, and D = 1 (section 3.6 of the paper)."""
        self.A_log.copy_(torch.arange(1, self.d_state + 1, dtype=torch.float32, device=self.A_log.device).log())
        self.D.fill_(1.0)
        for parameter in (self.A_log, self.D):
            vars(parameter)["_no_weight_decay"] = True

    def reset_parameters(self) -> None:
        """Draw the initial parameters, those of the sub-modules included."""
        for module in (self.in_proj, self.conv1d, self.x_proj, self.dt_proj, self.out_proj):
            module.reset_parameters()
        self._init_scan()

    @property
    def d_state(self) -> int:
        """States N per channel, read from the parameters."""
        return self.A_log.shape[1]

    @property
    def kernel_plan(self) -> KernelPlan | None:
        """The kernel that runs the scan at the present number of states; None before the first call.

        For an input of the shape that was last seen in training mode, or of the first one if there was no training.
        """
        if self._last_call is None:
            return None
        device, dtype, batch, length = self._last_call
        shapes = {"u": (batch, self.d_inner, length), "A": tuple(self.A_log.shape)}
        return plan("selective_scan", shapes, dtype, device)

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

    def _mix(
        self, hidden_states: Tensor, cache: tuple[Tensor, Tensor] | None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        batch, length, _ = hidden_states.shape
        if not torch.compiler.is_compiling() and (self.training or self._last_call is None):
            self._last_call = (hidden_states.device.type, working_dtype(hidden_states), batch, length)
        return mix(self, hidden_states, cache, cu_seqlens)

    def _mix_packed(
        self, hidden_states: Tensor, inference_params: Any, seq_idx: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        if inference_params is not None:
            raise bad_argument("inference_params", got="states to keep", expected="None with packed sequences")
        if seq_idx is None:
            return self._mix(hidden_states, None, cu_seqlens)
        if cu_seqlens is not None:
            raise bad_argument("seq_idx, cu_seqlens", got="both", expected="one of them")
        if seq_idx.shape != hidden_states.shape[:2] or seq_idx.is_floating_point():
            got, expected = f"{tuple(seq_idx.shape)} of {seq_idx.dtype}", f"integers {tuple(hidden_states.shape[:2])}"
            raise bad_argument("seq_idx", got=got, expected=expected)
        row = hidden_states.reshape(1, -1, self.d_model)
        return self._mix(row, None, packing(seq_idx)).view_as(hidden_states)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token of inference; both states are advanced in place.

        Args:
            hidden_states: (B, 1, d_model).
            conv_state: (B, d_inner, d_conv), the last inputs of the convolution, oldest first.
            ssm_state: (B, d_inner, N).

        Returns:
            (output (B, 1, d_model), conv_state, ssm_state).
        """
        if hidden_states.dim() != 3 or hidden_states.shape[1:] != (1, self.d_model):
            raise bad_argument(
                "hidden_states", got=f"shape {tuple(hidden_states.shape)}", expected=f"one token, (batch, 1, {self.d_model})"
            )
        batch = hidden_states.shape[0]
        for name, state, width in (("conv_state", conv_state, self.d_conv), ("ssm_state", ssm_state, self.d_state)):
            if state.shape != (batch, self.d_inner, width):
                raise bad_argument(name, got=f"shape {tuple(state.shape)}", expected=f"{(batch, self.d_inner, width)}")
        return step(self, hidden_states, conv_state, ssm_state), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Zero (conv_state (B, d_inner, d_conv), ssm_state (B, d_inner, N)); ``max_seqlen`` does not matter.

        The scan's state is float32 unless ``dtype`` says otherwise.
        """
        device = self.out_proj.weight.device
        conv = torch.zeros(batch_size, self.d_inner, self.d_conv, device=device, dtype=dtype or self.conv1d.weight.dtype)
        state = torch.promote_types(self.A_log.dtype, torch.float32)
        return conv, torch.zeros(batch_size, self.d_inner, self.d_state, device=device, dtype=dtype or state)

    def _cached_states(self, inference_params: Any, batch: int) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise ArgumentError("layer_idx: expected a number to keep this layer's states under, got None. Set layer.layer_idx")
        memory = inference_params.key_value_memory_dict
        if self.layer_idx not in memory:
            memory[self.layer_idx] = self.allocate_inference_cache(batch)
        return memory[self.layer_idx]

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_state={self.d_state}, d_inner={self.d_inner}, dt_rank={self.dt_rank}"
