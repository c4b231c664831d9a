"""Layers with the names and attributes of flash-linear-attention's, which is not needed for the tests; one step at a time."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

FLA = {
    "LinearAttention": "fla.layers.linear_attn",
    "SimpleGatedLinearAttention": "fla.layers.simple_gla",
    "GatedLinearAttention": "fla.layers.gla",
    "MultiScaleRetention": "fla.layers.multiscale_retention",
}
OTHERS = {
    "DeltaNet": "fla.layers.delta_net",
    "KimiDeltaAttention": "fla.layers.kda",
    "RotaryEmbedding": "fla.modules.rotary",
    "ShortConvolution": "fla.modules.convolution",
}


class FusedNorm(nn.RMSNorm):
    """A norm with a gate behind it."""

    def forward(self, x, gate):
        return super().forward(x) * F.silu(gate)


class Layer(nn.Module):
    """What they have in common.

    Args:
        behind: the heads' outputs: nothing, a norm, a gate behind the norm, or one within it.
    """

    def __init__(self, hidden_size=8, num_heads=4, num_kv_heads=None, expand_k=1.5, behind="nothing"):
        super().__init__()
        self.behind = behind
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads or num_heads
        self.num_kv_groups, self.expand_k = num_heads // self.num_kv_heads, expand_k
        self.key_dim = int(hidden_size * expand_k)
        self.head_k_dim, self.head_v_dim = self.key_dim // num_heads, hidden_size // num_heads
        self.key_dim_per_group = self.key_dim // self.num_kv_groups
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.key_dim_per_group, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size // self.num_kv_groups, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        if behind in ("gate", "gated norm"):
            self.g_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        if behind == "gated norm":
            self.g_norm_swish_gate = FusedNorm(self.head_v_dim, eps=1e-5)
        elif behind != "nothing":
            self.g_norm, self.gate_fn = nn.RMSNorm(self.head_v_dim, eps=1e-5), F.sigmoid

    def decays(self, x):
        return x.new_zeros(*x.shape[:2], self.num_heads, 1)

    def finish(self, out, x):
        if self.behind == "gated norm":
            out = self.g_norm_swish_gate(out, self.g_proj(x).unflatten(-1, (self.num_heads, -1)))
        elif self.behind != "nothing":
            out = self.g_norm(out)
        out = out.flatten(-2)
        return self.o_proj(out * self.gate_fn(self.g_proj(x)) if self.behind == "gate" else out)

    def placed(self, q, k, position):
        return q, k

    def forward(self, hidden_states, attention_mask=None, cache=None):
        """cache: a dict with the state and the number of tokens seen, which is written."""
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if attention_mask is not None:
            v = v * attention_mask[..., None]
        q = q.unflatten(-1, (self.num_heads, self.head_k_dim)) * self.head_k_dim**-0.5
        k, v = (x.unflatten(-1, (self.num_kv_heads, -1)) for x in (k, v))
        seen = {} if cache is None else cache
        q, k = self.placed(q, k, seen.get("tokens", 0))
        k, v = (x.repeat_interleave(self.num_kv_groups, 2) for x in (k, v))
        a, state, outputs = self.decays(hidden_states).exp(), seen.get("state", 0.0), []
        for t in range(q.shape[1]):
            state = a[:, t, ..., None] * state + k[:, t, ..., None] * v[:, t, :, None]
            outputs.append((q[:, t, :, None] @ state)[:, :, 0])
        seen.update(tokens=seen.get("tokens", 0) + q.shape[1], state=state)
        out = torch.stack(outputs, 1)
        if getattr(self, "do_feature_map_norm", False):
            out = out / ((q * k.cumsum(1)).sum(-1, keepdim=True) + 1e-10)
        return self.finish(out, hidden_states)


class LinearAttention(Layer):
    def __init__(self, feature_map="identity", do_feature_map_norm=False, **options):
        super().__init__(**options)
        self.feature_map_q = self.feature_map_k = nn.Identity() if feature_map == "identity" else nn.ReLU()
        self.norm_q, self.norm_k, self.do_feature_map_norm = False, False, do_feature_map_norm


class SimpleGatedLinearAttention(Layer):
    def __init__(self, **options):
        super().__init__(**options)
        self.use_short_conv, self.feature_map_fn, self.gate_logit_normalizer = False, None, 16
        self.gk_proj = nn.Linear(self.hidden_size, self.num_heads)

    def decays(self, x):
        return F.logsigmoid(self.gk_proj(x))[..., None] / self.gate_logit_normalizer


class GatedLinearAttention(Layer):
    def __init__(self, **options):
        super().__init__(**options)
        self.use_short_conv, self.feature_map_fn, self.gate_logit_normalizer, self.clamp_min = False, None, 2, -0.5
        self.gk_proj = nn.Sequential(nn.Linear(self.hidden_size, 3, bias=False), nn.Linear(3, self.key_dim_per_group))

    def decays(self, x):
        return (F.logsigmoid(self.gk_proj(x)) / 2).clamp_min(-0.5).unflatten(-1, (self.num_heads, self.head_k_dim))


class RotaryEmbedding(nn.Module):
    """A buffer that no checkpoint has, computed anew where it is not float32, and tables of it for the longest sequence."""

    def __init__(self, dim, base=10000.0, interleaved=False, scale_base=None):
        super().__init__()
        self.dim, self.base, self.interleaved = dim, base, interleaved
        self.register_buffer("inv_freq", torch.empty(dim // 2), persistent=False)
        self.register_buffer("scale", None if scale_base is None else torch.ones(dim // 2), persistent=False)
        self._seq_len_cached, self._cos_cached, self._sin_cached = 0, None, None
        self.reset_parameters()

    def reset_parameters(self):
        self.inv_freq.copy_(self._compute_inv_freq())

    def _compute_inv_freq(self, device=None):
        return 1.0 / (self.base ** (torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim))

    def _update_cos_sin_cache(self, seqlen, device=None, dtype=None):
        if seqlen > self._seq_len_cached or self._cos_cached is None or self._cos_cached.dtype != dtype:
            self._seq_len_cached = seqlen
            inv_freq = self.inv_freq if self.inv_freq.dtype == torch.float32 else self._compute_inv_freq(device=device)
            angles = torch.outer(torch.arange(seqlen, dtype=torch.float32), inv_freq)
            self._cos_cached, self._sin_cached = angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(self, q, k, seqlen_offset=0):
        end = seqlen_offset + q.shape[1]
        self._update_cos_sin_cache(end, device=q.device, dtype=q.dtype)
        cos, sin = (part[seqlen_offset:end, None] for part in (self._cos_cached, self._sin_cached))
        halves = (x.chunk(2, -1) for x in (q, k))
        return tuple(torch.cat([a * cos - b * sin, a * sin + b * cos], -1) for a, b in halves)


class MultiScaleRetention(Layer):
    def __init__(self, rotary=None, **options):
        super().__init__(**options)
        self.feature_map_fn, self.rotary = None, RotaryEmbedding(self.head_k_dim) if rotary == "fla" else rotary

    def placed(self, q, k, position):
        return (q, k) if self.rotary is None else self.rotary(q, k, seqlen_offset=position)

    def decays(self, x):
        return torch.log1p(-torch.exp2(-5.0 - torch.arange(self.num_heads))).to(x)[:, None].expand(*x.shape[:2], -1, 1)


class ShortConvolution(nn.Conv1d):
    """(batch, L, channels), and not (batch, channels, L), with SiLU; returns what it would keep for the next token as well."""

    def __init__(self, hidden_size, kernel_size, bias=False):
        super().__init__(hidden_size, hidden_size, kernel_size, groups=hidden_size, padding=kernel_size - 1, bias=bias)
        self.hidden_size, self.activation = hidden_size, "silu"

    def forward(self, x, mask=None, cache=None):
        assert x.shape[-1] == self.hidden_size == self.in_channels
        return F.silu(super().forward(x.mT)[..., : x.shape[1]]).mT, None


class DeltaNet(Layer):
    def __init__(self, **options):
        super().__init__(**options)
        self.expand_k, self.use_short_conv, self.use_beta, self.qk_activation, self.qk_norm = 1.5, True, True, "silu", "l2"
        self.allow_neg_eigval = True
        for name, size in (("q", self.key_dim), ("k", self.key_dim), ("v", self.hidden_size)):
            setattr(self, f"{name}_conv1d", ShortConvolution(size, 3))
        self.b_proj = nn.Linear(self.hidden_size, self.num_heads, bias=False)
        self.o_norm = nn.RMSNorm(self.head_v_dim, eps=1e-12)

    def forward(self, hidden_states):
        x, parts = hidden_states, {}
        for name in "qkv":
            out, _ = self.get_submodule(f"{name}_conv1d")(self.get_submodule(f"{name}_proj")(x))
            parts[name] = out.unflatten(-1, (self.num_heads, -1))
        q, k = (part * torch.rsqrt(part.square().sum(-1, keepdim=True) + 1e-6) for part in (parts["q"], parts["k"]))
        beta, state, outputs = 2 * self.b_proj(x).sigmoid(), x.new_zeros(len(x), 4, self.head_k_dim, self.head_v_dim), []
        for t in range(x.shape[1]):
            read = (k[:, t, :, None] @ state)[:, :, 0]
            state = state + beta[:, t, :, None, None] * k[:, t, ..., None] * (parts["v"][:, t] - read)[:, :, None]
            outputs.append((q[:, t, :, None] @ state)[:, :, 0])
        return self.o_proj(self.o_norm(torch.stack(outputs, 1)).flatten(-2))


class GatedNorm(nn.RMSNorm):
    def forward(self, x, g):
        return super().forward(x) * g.sigmoid()


class KimiDeltaAttention(nn.Module):
    def __init__(self, hidden_size=8, expand_v=1, head_dim=6, num_heads=2, num_v_heads=None, lower_bound=None, conv_bias=False):
        super().__init__()
        self.hidden_size, self.expand_v, self.lower_bound, self.allow_neg_eigval = hidden_size, expand_v, lower_bound, False
        self.num_heads, self.num_v_heads = num_heads, num_v_heads or num_heads
        self.head_dim = self.head_k_dim = head_dim
        self.head_v_dim = int(head_dim * expand_v)
        assert math.isclose(head_dim * expand_v, self.head_v_dim, rel_tol=1e-5)
        self.key_dim, self.value_dim = num_heads * head_dim, self.num_v_heads * self.head_v_dim
        self.gate_dim = self.num_v_heads * head_dim
        for name, size in (("q", self.key_dim), ("k", self.key_dim), ("v", self.value_dim)):
            setattr(self, f"{name}_proj", nn.Linear(hidden_size, size, bias=False))
            setattr(self, f"{name}_conv1d", ShortConvolution(size, 3, conv_bias))
        for name, size in (("f", self.gate_dim), ("g", self.value_dim)):
            inner = nn.Linear(hidden_size, self.head_v_dim, bias=False)
            setattr(self, f"{name}_proj", nn.Sequential(inner, nn.Linear(self.head_v_dim, size, bias=name == "g")))
        self.b_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(self.num_v_heads)), nn.Parameter(torch.randn(self.gate_dim))
        self.o_norm = GatedNorm(self.head_v_dim, eps=1e-12)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def forward(self, hidden_states):
        """The library's own one-step recurrence, each head of values beside the keys that it shares."""
        x, parts, share = hidden_states, {}, self.num_v_heads // self.num_heads
        for name, width in (("q", self.head_k_dim), ("k", self.head_k_dim), ("v", self.head_v_dim)):
            out, _ = self.get_submodule(f"{name}_conv1d")(self.get_submodule(f"{name}_proj")(x))
            parts[name] = out.unflatten(-1, (-1, width))
        q, k = (parts[n] * torch.rsqrt(parts[n].square().sum(-1, keepdim=True) + 1e-6) for n in "qk")
        q, k = (part.repeat_interleave(share, 2) for part in (q * self.head_k_dim**-0.5, k))
        logits = self.f_proj(x).unflatten(-1, (-1, self.head_k_dim)) + self.dt_bias.view(-1, self.head_k_dim)
        rates = self.A_log.exp()[:, None]
        g = -rates * F.softplus(logits) if self.lower_bound is None else self.lower_bound * (rates * logits).sigmoid()
        beta, state, outputs = self.b_proj(x).sigmoid(), x.new_zeros(len(x), *g.shape[2:], self.head_v_dim), []
        for t in range(x.shape[1]):
            state = g[:, t, ..., None].exp() * state
            read = (k[:, t, :, None] @ state)[:, :, 0]
            state = state + beta[:, t, :, None, None] * k[:, t, ..., None] * (parts["v"][:, t] - read)[:, :, None]
            outputs.append((q[:, t, :, None] @ state)[:, :, 0])
        gate = self.g_proj(x).unflatten(-1, (-1, self.head_v_dim))
        return self.o_proj(self.o_norm(torch.stack(outputs, 1), gate).flatten(-2))


for _name, _module in {**FLA, **OTHERS}.items():
    globals()[_name].__module__ = _module
