"""Linear attention: RetNet's retention, gated linear attention with decays of heads or of channels, or without any decay."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.errors import bad_argument, check_integer
from compressm.kernels import KernelPlan, linear_attention, linear_attention_update, plan
from compressm.layers.gated_norm import GatedRMSNorm
from compressm.layers.mamba_layer import MambaLayer
from compressm.layers.mamba_mixer import Convolution, convolve, convolve_step
from compressm.layers.norms import RMSNorm

DECAYS = ("none", "fixed", "scalar", "channel")
NORMS = ("g_norm_swish_gate.weight", "norm.weight")  # what flash-linear-attention calls the weight of the norm as well


class LinearAttention(MambaLayer):
    """(B, L, d_model) -> (B, L, d_model): queries read a state per head that keys and values were written to.

    Parameters are named as in flash-linear-attention, whose checkpoints load as they are where there is no feature map and
    every head has keys and values of its own: with ``decay="none"`` those of its ``LinearAttention``, with ``"fixed"`` and
    ``rotary=True`` of ``MultiScaleRetention`` (Sun et al. 2023, arXiv 2307.08621), with ``"scalar"`` of
    ``SimpleGatedLinearAttention``, with ``"channel"`` of ``GatedLinearAttention`` (Yang et al. 2023, arXiv 2312.06635).  The
    ways of calling are those of :class:`compressm.layers.Mamba2`.

    Args:
        d_model: channels in and out.
        num_heads: heads H.
        expand_k, expand_v: keys and queries have ``expand_k * d_model`` channels in all, values ``expand_v * d_model``.
        decay: of a head's state: ``"none"``; ``"fixed"``, 1 - 2^-(5 + h) a step in head h; ``"scalar"``, one number a step that
            ``gk_proj`` makes of the token; ``"channel"``, one for every channel of the keys.
        d_conv: taps of a causal convolution with SiLU behind each of the three projections; 0: none.
        conv_bias: whether these have a bias.
        rotary: queries and keys turn with their position, channel j of a head together with channel j + K / 2, which have to
            decay alike.
        rotary_base: the slowest pair turns by about one in so many steps.
        output_norm: an RMS norm over each head's values.
        output_gate: a SiLU gate behind that norm.
        gate_logit_normalizer: log decays are logsigmoid(...) divided by this.
        gate_low_rank_dim: width inside ``gk_proj`` of ``"channel"``.
        scale: of the queries; None: K^-0.5.
        norm_eps: added to the mean square.
        chunk_size: steps of a chunk; None: as its plan says.
        layer_idx: key of this layer in ``inference_params.key_value_memory_dict``.
        device, dtype: of the parameters.

    Parameters (K and V of all heads): ``q_proj.weight`` and ``k_proj.weight`` (K, d_model), ``v_proj.weight`` (V, d_model),
    ``o_proj.weight`` (d_model, V), ``g_norm.weight`` (V / H,), with a gate ``g_proj.weight`` (V, d_model), with ``"scalar"``
    ``gk_proj`` d_model -> H, with ``"channel"`` ``gk_proj.0`` and ``gk_proj.1`` d_model -> gate_low_rank_dim -> K, with
    ``d_conv`` ``q_conv1d``, ``k_conv1d`` and ``v_conv1d``.
    """

    log_decay: Tensor | None
    inv_freq: Tensor | None
    q_conv1d: nn.Conv1d
    k_conv1d: nn.Conv1d
    v_conv1d: nn.Conv1d

    def __init__(
        self,
        d_model: int,
        num_heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        decay: str = "scalar",
        d_conv: int = 0,
        conv_bias: bool = False,
        rotary: bool = False,
        rotary_base: float = 10000.0,
        output_norm: bool = True,
        output_gate: bool = True,
        gate_logit_normalizer: float = 16.0,
        gate_low_rank_dim: int = 16,
        scale: float | None = None,
        norm_eps: float = 1e-5,
        chunk_size: int | None = None,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "num_heads": num_heads, "gate_low_rank_dim": gate_low_rank_dim, "d_conv": d_conv}
        for name, size in sizes.items():
            check_integer(name, size, least=0 if name == "d_conv" else 1)
        if decay not in DECAYS:
            raise bad_argument("decay", got=repr(decay), expected=f"one of {', '.join(DECAYS)}")
        if rotary and decay == "channel":
            raise bad_argument("rotary", got=True, expected='False with decay="channel": pairs of channels have to decay alike')
        if output_gate and not output_norm:
            raise bad_argument("output_gate", got=True, expected="False where there is no norm in front of it (output_norm)")
        keys = _width("expand_k", expand_k, d_model, num_heads, even=rotary)
        values = _width("expand_v", expand_v, d_model, num_heads)
        self.d_model, self.num_heads, self.decay, self.d_conv = d_model, num_heads, decay, d_conv
        self.expand_k, self.expand_v, self.scale = expand_k, expand_v, scale
        self.gate_logit_normalizer, self.chunk_size, self.layer_idx = gate_logit_normalizer, chunk_size, layer_idx
        self.rotary_base = rotary_base
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj, self.k_proj = (nn.Linear(d_model, keys, bias=False, **options) for _ in range(2))
        self.v_proj = nn.Linear(d_model, values, bias=False, **options)
        if d_conv:
            for name, width in (("q_conv1d", keys), ("k_conv1d", keys), ("v_conv1d", values)):
                taps = nn.Conv1d(width, width, d_conv, groups=width, padding=d_conv - 1, bias=conv_bias, **options)
                self.add_module(name, taps)
        if decay == "scalar":
            self.gk_proj: nn.Module = nn.Linear(d_model, num_heads, **options)
        elif decay == "channel":
            inner = nn.Linear(d_model, gate_low_rank_dim, bias=False, **options)
            self.gk_proj = nn.Sequential(inner, nn.Linear(gate_low_rank_dim, keys, **options))
        if output_gate:
            self.g_proj = nn.Linear(d_model, values, bias=False, **options)
            self.g_norm: nn.Module = GatedRMSNorm(values // num_heads, eps=norm_eps, norm_before_gate=True, **options)
        elif output_norm:
            self.g_norm = RMSNorm(values // num_heads, eps=norm_eps, **options)
        self.o_proj = nn.Linear(values, d_model, bias=False, **options)
        self.output_norm, self.output_gate = output_norm, output_gate
        steps = torch.arange(num_heads, device=device, dtype=torch.float32)
        fixed = torch.log1p(-torch.exp2(-5.0 - steps)) if decay == "fixed" else None
        self.register_buffer("log_decay", fixed, persistent=False)
        self.register_buffer("inv_freq", _frequencies(keys // num_heads, rotary_base, device) if rotary else None, False)

    @property
    def d_state(self) -> int:
        """Channels of a head's keys."""
        return self.k_proj.weight.shape[0] // self.num_heads

    def mixing(
        self, hidden_states: Tensor, cache: tuple[Tensor, Tensor] | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """The whole layer from a zero state; cache: as of :meth:`step`, which is written."""
        parts = self._project(hidden_states)
        if self.d_conv:
            if cache is not None:
                inputs = torch.cat(parts, -1).mT.detach()
                cache[0].copy_(F.pad(inputs, (self.d_conv, 0))[..., inputs.shape[-1] :])
            parts = [convolve(taps, x.mT, cu_seqlens).mT for taps, x in zip(self._taps(), parts, strict=True)]
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in parts)
        length = hidden_states.shape[1]
        if self.inv_freq is not None:
            angles = torch.arange(length, device=q.device)[:, None, None] * self.inv_freq
            q, k = turn(q, angles), turn(k, angles)
        out, last = linear_attention(
            q, k, v, self._log_decays(hidden_states), self.scale, output_final_state=cache is not None, cu_seqlens=cu_seqlens,
            chunk_size=self.chunk_size,
        )  # fmt: skip
        if cache is not None and last is not None:
            if self.inv_freq is not None:
                last = turn(last.mT, (1 - length) * self.inv_freq).mT
            cache[1].copy_(last.detach())
        return self._finish(out, hidden_states)

    def stepping(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """One token (B, 1, d_model); both states are advanced in place.

        The keys that the state holds are turned as seen from the last token, so that no step needs to know its position.
        """
        token = hidden_states[:, 0]
        parts = self._project(token)
        if self.d_conv:
            ends = itertools.accumulate(x.shape[-1] for x in parts)
            windows = [conv_state[:, end - x.shape[-1] : end] for end, x in zip(ends, parts, strict=True)]
            parts = [convolve_step(taps, x, seen) for taps, x, seen in zip(self._taps(), parts, windows, strict=True)]
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in parts)
        if self.inv_freq is not None:
            ssm_state.copy_(turn(ssm_state.mT, -self.inv_freq).mT)
        out = linear_attention_update(ssm_state, q, k, v, self._log_decays(token), self.scale)
        return self._finish(out, token).unsqueeze(1)

    def _project(self, hidden_states: Tensor) -> list[Tensor]:
        return [projection(hidden_states) for projection in (self.q_proj, self.k_proj, self.v_proj)]

    def _taps(self) -> list[Convolution]:
        return [Convolution(taps) for taps in (self.q_conv1d, self.k_conv1d, self.v_conv1d)]

    def _log_decays(self, hidden_states: Tensor) -> Tensor | None:
        if self.decay in ("none", "fixed"):
            return self.log_decay
        logits = self.gk_proj(hidden_states)
        g = F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))) / self.gate_logit_normalizer
        return g.unflatten(-1, (self.num_heads, -1)) if self.decay == "channel" else g

    def _finish(self, out: Tensor, hidden_states: Tensor) -> Tensor:
        """Norm, gate and projection behind the heads' outputs (..., H, V)."""
        if self.output_gate:
            out = self.g_norm(out, self.g_proj(hidden_states).unflatten(-1, (self.num_heads, -1)))
        elif self.output_norm:
            out = self.g_norm(out)
        return self.o_proj(out.flatten(-2))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Zero (conv_state, ssm_state), shapes as in :meth:`step`; ``max_seqlen`` does not matter.

        The state is float32 unless ``dtype`` says otherwise.
        """
        weight, (window, state) = self.o_proj.weight, self._state_shapes
        wide = torch.promote_types(weight.dtype, torch.float32)
        conv_state = torch.zeros(batch_size, *window, device=weight.device, dtype=dtype or weight.dtype)
        return conv_state, torch.zeros(batch_size, *state, device=weight.device, dtype=dtype or wide)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> LinearAttention:
        """Fixed decays and frequencies, which half precision cannot tell from others, stay in float32 at least."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype.itemsize < 4:
                self._buffers[name] = buffer.to(moved.device, torch.float32)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any) -> None:
        """The norm's weight has other names where it is fused with its gate, and where there is none."""
        for name in NORMS:
            if self.output_norm and prefix + name in state_dict:
                state_dict[prefix + "g_norm.weight"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args, **options)

    @property
    def head_k_dim(self) -> int:
        """Channels K of a head's keys and queries."""
        return self.q_proj.out_features // self.num_heads

    @property
    def head_v_dim(self) -> int:
        """Channels V of a head's values."""
        return self.v_proj.out_features // self.num_heads

    def plan_for(self, device: str, dtype: torch.dtype, batch: int, length: int) -> KernelPlan:
        q, v = ((batch, length, self.num_heads, width) for width in (self.head_k_dim, self.head_v_dim))
        return plan("linear_attention", {"q": q, "v": v, **({"g": q} if self.decay == "channel" else {})}, dtype, device)

    @property
    def _state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """conv_state (B, channels of q, k and v, d_conv), empty without convolutions, and ssm_state (B, H, K, V)."""
        channels = 2 * self.q_proj.out_features + self.v_proj.out_features
        return (channels if self.d_conv else 0, self.d_conv), (self.num_heads, self.head_k_dim, self.head_v_dim)

    def extra_repr(self) -> str:
        sizes = f"d_model={self.d_model}, heads={self.num_heads}, head_k_dim={self.head_k_dim}, head_v_dim={self.head_v_dim}"
        return f"{sizes}, decay={self.decay}"


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """x (..., K) with channels j and j + K / 2 turned by angles (..., K / 2)."""
    wide = torch.promote_types(x.dtype, angles.dtype)
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    first, second = x.to(wide).chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)


def _frequencies(keys: int, base: float, device: torch.device | str | None) -> Tensor:
    """How far each pair of channels turns in a step."""
    return torch.exp(torch.arange(0, keys, 2, device=device, dtype=torch.float32) * (-math.log(base) / keys))


def _width(name: str, expand: float, d_model: int, heads: int, even: bool = False) -> int:
    """Channels of all heads; raises ArgumentError unless they divide into heads, and these into pairs where ``even``."""
    width = round(expand * d_model)
    if width < 1 or width % heads or (even and width // heads % 2):
        got = f"{expand}, which gives {width} channels"
        raise bad_argument(name, got=got, expected=f"a multiple of {2 * heads if even else heads} channels, for {heads} heads")
    return width
