"""Mamba, the selective state-space layer (Gu and Dao 2023, arXiv 2312.00752)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.errors import ArgumentError, bad_argument
from compressm.kernels import (
    KernelPlan,
    causal_conv1d,
    causal_conv1d_update,
    plan,
    selective_scan,
    selective_state_update,
)
from compressm.layers._whole_mixer import whole_mixer, working_dtype

MAX_TAPS = 8  # of the causal convolution's kernels


class Mamba(nn.Module):
    """The Mamba-1 mixer: (B, L, d_model) -> (B, L, d_model).

    Constructor, parameter names, shapes, initialisation and inference methods are those of ``mamba_ssm.Mamba``; checkpoints
    of it, and the mixers of transformers' Mamba models, load as they are.  There is no upper limit on the states, and it
    runs on CPU and GPU without ``causal-conv1d``.

    Args:
        d_model: channels in and out.
        d_state: states N per inner channel.
        d_conv: taps of the causal convolution, 1 to 8.
        expand: inner channels are ``expand * d_model``.
        dt_rank: rank of the step sizes' projection; ``"auto"``: ceil(d_model / 16).
        dt_min, dt_max: range of the initial step sizes, drawn log-uniformly.
        dt_init: ``"random"`` or ``"constant"`` initial weights of ``dt_proj``, of scale ``dt_scale / sqrt(dt_rank)``.
        dt_scale: see ``dt_init``.
        dt_init_floor: least initial step size.
        conv_bias, bias: whether the convolution, and the projections in and out, have a bias.
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
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise bad_argument(name, got=repr(value), expected="a positive integer")
        if d_conv > MAX_TAPS:
            raise bad_argument("d_conv", got=d_conv, expected=f"at most {MAX_TAPS} taps")
        if int(expand * d_model) < 1:
            raise bad_argument("expand", got=expand, expected="a number such that expand * d_model is at least 1")
        if dt_rank != "auto" and (isinstance(dt_rank, bool) or not isinstance(dt_rank, int) or dt_rank < 1):
            raise bad_argument("dt_rank", got=repr(dt_rank), expected="a positive integer or 'auto'")
        if dt_init not in ("random", "constant"):
            raise bad_argument("dt_init", got=repr(dt_init), expected="'random' or 'constant'")
        if not 0 < dt_min <= dt_max:
            raise bad_argument("dt_min, dt_max", got=(dt_min, dt_max), expected="0 < dt_min <= dt_max")
        options = {"device": device, "dtype": dtype}
        self.d_model, self.d_conv, self.expand, self.layer_idx = d_model, d_conv, expand, layer_idx
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **options)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **options
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **options)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **options)
        self._init_step_sizes(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        decay = torch.arange(1, d_state + 1, dtype=torch.float32, device=device).repeat(self.d_inner, 1)
        self.A_log = nn.Parameter(decay.log())
        self.D = nn.Parameter(torch.ones(self.d_inner, device=device))
        self.A_log._no_weight_decay = self.D._no_weight_decay = True
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **options)
        self._last_call: tuple[str, torch.dtype, int, int] | None = None  # device type, dtype, batch and length of the input

    @torch.no_grad()
    def _init_step_sizes(self, dt_min: float, dt_max: float, dt_init: str, dt_scale: float, floor: float) -> None:
        """``softplus(dt_proj.bias)`` log-uniform in [dt_min, dt_max] (section 3.6 of the paper)."""
        scale = dt_scale * self.dt_rank**-0.5
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, scale)
        else:
            nn.init.uniform_(self.dt_proj.weight, -scale, scale)
        span = math.log(dt_max) - math.log(dt_min)
        dt = torch.exp(torch.rand(self.d_inner, device=self.dt_proj.bias.device) * span + math.log(dt_min)).clamp_min(floor)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.dt_proj.bias._no_reinit = True

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

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        """Run over a sequence.

        Args:
            hidden_states: (B, L, d_model).
            inference_params: None, or an object with ``seqlen_offset`` (tokens already seen) and
                ``key_value_memory_dict``, as in mamba_ssm: at offset 0 the sequence is a prompt whose states are stored under
                ``layer_idx``; behind it the sequence must be one token.

        Returns:
            (B, L, d_model).
        """
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.d_model:
            got = f"shape {tuple(hidden_states.shape)}"
            raise bad_argument("hidden_states", got=got, expected=f"(batch, length, {self.d_model})")
        if inference_params is None:
            return self._mix(hidden_states, None)
        conv_state, ssm_state = self._cached_states(inference_params, hidden_states.shape[0])
        if inference_params.seqlen_offset > 0:
            return self.step(hidden_states, conv_state, ssm_state)[0]
        return self._mix(hidden_states, (conv_state, ssm_state))

    def _mix(self, hidden_states: Tensor, cache: tuple[Tensor, Tensor] | None) -> Tensor:
        """The whole mixer from a zero state; writes the final states into ``cache``."""
        batch, length, _ = hidden_states.shape
        if not torch.compiler.is_compiling() and (self.training or self._last_call is None):
            self._last_call = (hidden_states.device.type, working_dtype(hidden_states), batch, length)
        if cache is None and (out := whole_mixer(self, hidden_states)) is not None:
            return out
        x, z = self._project_in(hidden_states)
        if cache is not None:
            cache[0].copy_(F.pad(x.detach(), (self.d_conv, 0))[..., length:])
        x = self._convolve(x)
        dt, B, C = self._selection(x.mT)
        result = selective_scan(
            x, dt.mT, self._decay(), B.mT, C.mT, self.D, z, self.dt_proj.bias, delta_softplus=True,
            return_last_state=cache is not None,
        )  # fmt: skip
        if cache is not None:
            result, last = result
            cache[1].copy_(last.detach())
        return self.out_proj(result.mT)

    def _project_in(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """x and gate z, (B, d_inner, L) each: channels next to each other in memory on CPU, time steps on GPU."""
        if hidden_states.is_cuda:
            xz = self.in_proj.weight @ hidden_states.mT
            if self.in_proj.bias is not None:
                xz = xz + self.in_proj.bias.to(xz.dtype)[:, None]
            return xz.chunk(2, dim=1)
        if hidden_states.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
            hidden_states = hidden_states.to(torch.get_autocast_dtype("cpu"))  # once for both halves
        biases = (None, None) if self.in_proj.bias is None else self.in_proj.bias.chunk(2)
        x, z = (F.linear(hidden_states, *half) for half in zip(self.in_proj.weight.chunk(2), biases, strict=True))
        return x.mT, z.mT

    def _convolve(self, x: Tensor) -> Tensor:
        """silu(causal depthwise convolution) of x (B, d_inner, L)."""
        return causal_conv1d(x, self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu")

    def _decay(self) -> Tensor:
        """A = -exp(A_log) (d_inner, N), in float32 at least."""
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def _selection(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What depends on the token, from x (..., d_inner): step sizes before bias (..., d_inner), B and C (..., N)."""
        low_rank, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return low_rank @ self.dt_proj.weight.t().contiguous(), B, C

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
        x, z = self.in_proj(hidden_states[:, 0]).chunk(2, dim=-1)
        x = causal_conv1d_update(x, conv_state, self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu")
        dt, B, C = self._selection(x)
        y = selective_state_update(
            ssm_state, x, dt, self._decay(), B, C, self.D, z, self.dt_proj.bias, dt_softplus=True
        )
        return self.out_proj(y).unsqueeze(1), conv_state, ssm_state

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
