"""Mamba, the selective state-space layer (Gu and Dao 2023, arXiv 2312.00752)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from compressm.errors import bad_argument, check_integer
from compressm.kernels import KernelPlan, plan
from compressm.layers.mamba_layer import MambaLayer
from compressm.layers.mamba_mixer import mix, step
from compressm.layers.step_sizes import StepSizes


class Mamba(MambaLayer):
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
        use_fast_path: on a CPU one op may compute the whole mixer, where every sub-module is plain; False: never.
        layer_idx: key of this layer in ``inference_params.key_value_memory_dict``.
        device, dtype: of the parameters; ``A_log`` and ``D`` are kept in float32.

    Parameters (d_inner channels, R = dt_rank): ``in_proj.weight`` (2 d_inner, d_model), ``conv1d.weight`` (d_inner, 1, d_conv),
    ``conv1d.bias``, ``x_proj.weight`` (R + 2N, d_inner), ``dt_proj.weight`` (d_inner, R), ``dt_proj.bias``, ``A_log``
    (d_inner, N), ``D`` (d_inner,), ``out_proj.weight`` (d_model, d_inner).
    """

    mixing, stepping = mix, step

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
            check_integer(name, value)
        if int(expand * d_model) < 1:
            raise bad_argument("expand", got=expand, expected="a number such that expand * d_model is at least 1")
        if dt_rank != "auto":
            check_integer("dt_rank", dt_rank, expected="a positive integer or 'auto'")
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

    def plan_for(self, device: str, dtype: torch.dtype, batch: int, length: int) -> KernelPlan:
        shapes = {"u": (batch, self.d_inner, length), "A": tuple(self.A_log.shape)}
        return plan("selective_scan", shapes, dtype, device)

    @property
    def _state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """conv_state (B, d_inner, d_conv) and ssm_state (B, d_inner, N)."""
        return (self.d_inner, self.d_conv), (self.d_inner, self.d_state)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_state={self.d_state}, d_inner={self.d_inner}, dt_rank={self.dt_rank}"
