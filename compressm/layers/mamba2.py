"""Mamba-2, the state-space dual layer (Dao and Gu 2024, arXiv 2405.21060)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from compressm.errors import bad_argument, check_integer, check_number
from compressm.kernels import KernelPlan, plan
from compressm.layers.gated_norm import GatedRMSNorm
from compressm.layers.mamba2_mixer import NO_LIMIT, layout, mix, states, step
from compressm.layers.mamba_layer import MambaLayer


class Mamba2(MambaLayer):
    """The Mamba-2 mixer: (B, L, d_model) -> (B, L, d_model).

    Constructor, parameter names, shapes, initialisation and inference methods are those of ``mamba_ssm.Mamba2``; checkpoints
    of it, and the mixers of transformers' Mamba-2 models, load as they are.  There is no upper limit on the states, and it runs
    on CPU and GPU without ``causal-conv1d``.

    The projected form (``d_features=``) has two maps per group, ``B_map`` and ``C_map``, behind convolution and activation: the
    ``d_features`` channels of B and of C become the ``d_state`` that the scan has.  The scan, its state and its cache shrink
    with ``d_state`` and the projection stays.  With as many states as features the maps begin as identities, and checkpoints
    without them load.

    Args:
        d_model: channels in and out.
        d_state: states N per channel of the scan.
        d_conv: taps of the causal convolution; compiled kernels have up to 8.
        conv_init: taps are drawn from +- this; None: as torch draws them.
        expand: inner channels d_inner are ``expand * d_model``.
        headdim: channels P of a head.
        d_ssm: channels of the scan, the rest of d_inner is a gated MLP beside it; None: all of d_inner.
        ngroups: groups G of heads, each with B and C of its own.
        A_init_range: of the initial decay rates, drawn uniformly.
        D_has_hdim: ``D`` has one number a channel and not one a head.
        rmsnorm: a gated RMS norm, over each group, in front of ``out_proj``; False: the gate alone.
        norm_before_gate: the gate is behind that norm.
        dt_min, dt_max: range of the initial step sizes, drawn log-uniformly.
        dt_init_floor: least initial step size.
        dt_limit: range that step sizes are cut to, in decoding as well.
        bias, conv_bias: whether the projections in and out, and the convolution, have a bias.
        chunk_size: steps of a chunk of the scan; None: as its plan says.
        use_mem_eff_path: does not matter.
        layer_idx: key of this layer in ``inference_params.key_value_memory_dict``.
        process_group: None; tensor parallelism is not supported.
        sequence_parallel: does not matter.
        device, dtype: of the parameters; ``A_log``, ``D`` and ``dt_bias`` are kept in float32.
        d_features: channels of B and of C per group, at least ``d_state``, in front of the maps; None: no maps.

    Parameters (H = d_ssm / P heads, F = d_features or N): ``in_proj.weight`` (2 d_inner + 2 G F + H, d_model),
    ``conv1d.weight`` (d_ssm + 2 G F, 1, d_conv), ``conv1d.bias``, ``dt_bias`` (H,), ``A_log`` (H,), ``D`` (H,) or (d_ssm,),
    ``norm.weight`` (d_ssm,), ``out_proj.weight`` (d_model, d_inner), and with ``d_features`` ``B_map`` and ``C_map``
    (G, N, F).
    """

    mixing, stepping = mix, step
    takes_maps = True
    B_map: nn.Parameter | None
    C_map: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = NO_LIMIT,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int | None = None,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: None = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        d_features: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "d_state": d_state, "d_conv": d_conv, "headdim": headdim, "ngroups": ngroups}
        _check_numbers({**sizes, "d_ssm": d_ssm, "chunk_size": chunk_size}, expand, dt_init_floor, conv_init)
        self.d_inner = int(expand * d_model)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        _check_heads(self.d_inner, self.d_ssm, headdim, ngroups)
        _check_ranges(A_init_range, dt_min, dt_max, dt_limit)
        _check_choices(process_group, d_features, d_state)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.d_conv, self.expand, self.conv_init = d_model, d_conv, expand, conv_init
        self.headdim, self.ngroups, self.nheads = headdim, ngroups, self.d_ssm // headdim
        self.A_init_range, self.D_has_hdim, self.dt_limit = A_init_range, D_has_hdim, tuple(dt_limit)
        self.rmsnorm, self.norm_before_gate = rmsnorm, norm_before_gate
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, dt_init_floor
        self.chunk_size, self.layer_idx = chunk_size, layer_idx
        features = d_state if d_features is None else d_features
        inner = self.d_ssm + 2 * ngroups * features
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner - self.d_ssm + inner + self.nheads, bias=bias, **options)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1, bias=conv_bias, **options)
        single: dict[str, Any] = {"device": device, "dtype": torch.float32}
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, **single))
        self.A_log = nn.Parameter(torch.empty(self.nheads, **single))
        self.D = nn.Parameter(torch.empty(self.d_ssm if D_has_hdim else self.nheads, **single))
        if rmsnorm:
            self.norm = GatedRMSNorm(self.d_ssm, ngroups, norm_before_gate=norm_before_gate, **options)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **options)
        for name in ("B_map", "C_map"):
            shape = ngroups, d_state, features
            self.register_parameter(name, None if d_features is None else nn.Parameter(torch.empty(shape, **options)))
        self._init_scan()

    @torch.no_grad()
    def _init_scan(self) -> None:
        """What sub-modules do not draw: taps in +- ``conv_init``, decay rates, step sizes, D = 1, and the maps."""
        if self.conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -self.conv_init, self.conv_init)
        span = math.log(self.dt_max) - math.log(self.dt_min)
        dt = torch.exp(torch.rand_like(self.dt_bias) * span + math.log(self.dt_min)).clamp_min(self.dt_init_floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log.uniform_(*self.A_init_range).log_()
        self.D.fill_(1.0)
        for parameter in (self.dt_bias, self.A_log, self.D):
            vars(parameter)["_no_weight_decay"] = True
        if self.B_map is not None and self.C_map is not None:
            self._init_maps(self.B_map, self.C_map)

    @staticmethod
    def _init_maps(B_map: nn.Parameter, C_map: nn.Parameter) -> None:
        """The identity, or the same random orthogonal rows for B and C, of a length that keeps the size of their products."""
        _, states, features = B_map.shape
        for B, C in zip(B_map, C_map, strict=True):
            if states == features:
                nn.init.eye_(B)
            else:
                rows = nn.init.orthogonal_(torch.empty(states, features, device=B.device), (features / states) ** 0.25)
                B.copy_(rows)
            C.copy_(B)
        for parameter in (B_map, C_map):
            vars(parameter)["_no_weight_decay"] = True

    def reset_parameters(self) -> None:
        """Draw the initial parameters, those of the sub-modules included."""
        modules: list[Any] = [self.in_proj, self.conv1d, self.out_proj, *([self.norm] if self.rmsnorm else [])]
        for module in modules:
            module.reset_parameters()
        self._init_scan()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any) -> None:
        """A checkpoint without maps fits a layer of as many states as features: there they are identities."""
        if self.B_map is not None and self.B_map.shape[1] == self.B_map.shape[2]:
            names = [prefix + name for name in ("B_map", "C_map")]
            if prefix + "in_proj.weight" in state_dict and not any(name in state_dict for name in names):
                identity = torch.eye(self.d_state).expand(self.ngroups, -1, -1)
                state_dict.update(dict.fromkeys(names, identity))
        super()._load_from_state_dict(state_dict, prefix, *args, **options)

    @property
    def d_state(self) -> int:
        """States N per channel of the scan, read from the parameters."""
        return states(self)

    @property
    def d_features(self) -> int | None:
        """Channels of B and of C per group in front of the maps; None where there are no maps."""
        return None if self.B_map is None else self.B_map.shape[2]

    def plan_for(self, device: str, dtype: torch.dtype, batch: int, length: int) -> KernelPlan:
        shapes = {"x": (batch, length, self.nheads, self.headdim), "B": (batch, length, self.ngroups, self.d_state)}
        return plan("ssd", shapes, dtype, device)

    @property
    def _state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """conv_state (B, d_ssm + 2 G F, d_conv) and ssm_state (B, H, P, N)."""
        return (sum(layout(self).convolved), self.d_conv), (self.nheads, self.headdim, self.d_state)

    def extra_repr(self) -> str:
        sizes = f"d_model={self.d_model}, d_state={self.d_state}, heads={self.nheads}, headdim={self.headdim}"
        return f"{sizes}, ngroups={self.ngroups}" + ("" if self.B_map is None else f", d_features={self.d_features}")


def _check_numbers(sizes: dict[str, Any], expand: Any, dt_init_floor: Any, conv_init: Any) -> None:
    """Raise ArgumentError unless sizes that are given are positive, and the other numbers not negative."""
    for name, value in sizes.items():
        if value is not None or name not in ("d_ssm", "chunk_size"):
            check_integer(name, value)
    for name, value in (("expand", expand), ("dt_init_floor", dt_init_floor), ("conv_init", conv_init)):
        if value is not None or name != "conv_init":
            check_number(name, value, "a number that is not negative", lambda number: 0 <= number < math.inf)


def _check_choices(process_group: Any, d_features: Any, d_state: int) -> None:
    if process_group is not None:
        raise bad_argument("process_group", got=type(process_group).__name__, expected="None: one process has all heads")
    if d_features is not None:
        check_integer("d_features", d_features, d_state, expected=f"an integer from d_state = {d_state} on, or None")


def _check_heads(d_inner: int, d_ssm: int, headdim: int, ngroups: int) -> None:
    """Raise ArgumentError unless the scan's channels divide into heads, and these into groups."""
    if not 1 <= d_ssm <= d_inner:
        raise bad_argument("d_ssm", got=d_ssm, expected=f"a number of channels from 1 to expand * d_model = {d_inner}")
    if d_ssm % headdim:
        raise bad_argument("headdim", got=headdim, expected=f"a divisor of the scan's {d_ssm} channels (d_ssm)")
    if (d_ssm // headdim) % ngroups:
        raise bad_argument("ngroups", got=ngroups, expected=f"a divisor of the {d_ssm // headdim} heads (d_ssm / headdim)")


def _check_ranges(A_init_range: tuple[float, float], dt_min: float, dt_max: float, dt_limit: tuple[float, float]) -> None:
    for name, given, expected, infinite in (
        ("A_init_range", A_init_range, "two numbers, 0 < low <= high", False),
        ("dt_min, dt_max", (dt_min, dt_max), "two numbers, 0 < dt_min <= dt_max", False),
        ("dt_limit", dt_limit, "two numbers, 0 <= low <= high", True),
    ):
        try:
            low, high = (number + 0.0 for number in given)
        except (TypeError, ValueError):
            low = high = math.nan
        if not ((0 <= low < math.inf and low <= high) if infinite else 0 < low <= high < math.inf):
            raise bad_argument(name, got=repr(given), expected=expected)
