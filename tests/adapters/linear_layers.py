"""Layers with the names and attributes of flash-linear-attention's, which is not needed for the tests; one step at a time."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

FLA = {
    "LinearAttention": "fla.layers.linear_attn",
    "SimpleGatedLinearAttention": "fla.layers.simple_gla",
    "GatedLinearAttention": "fla.layers.gla",
    "MultiScaleRetention": "fla.layers.multiscale_retention",
}
OTHERS = {"DeltaNet": "fla.layers.delta_net", "ShortConvolution": "fla.modules.convolution"
}  # fmt: skip


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
        self.num_kv_groups = num_heads // self.num_kv_heads
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

    def forward(self, hidden_states, attention_mask=None):
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if attention_mask is not None:
            v = v * attention_mask[..., None]
        q = q.unflatten(-1, (self.num_heads, self.head_k_dim)) * self.head_k_dim**-0.5
        k, v = (x.unflatten(-1, (self.num_kv_heads, -1)).repeat_interleave(self.num_kv_groups, 2) for x in (k, v))
        a, state, outputs = self.decays(hidden_states).exp(), 0.0, []
        for t in range(q.shape[1]):
            state = a[:, t, ..., None] * state + k[:, t, ..., None] * v[:, t, :, None]
            outputs.append((q[:, t, :, None] @ state)[:, :, 0])
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


class MultiScaleRetention(Layer):
    def __init__(self, rotary=None, **options):
        super().__init__(**options)
        self.feature_map_fn, self.rotary = None, rotary

    def decays(self, x):
        return torch.log1p(-torch.exp2(-5.0 - torch.arange(self.num_heads))).to(x)[:, None].expand(*x.shape[:2], -1, 1)


class ShortConvolution(nn.Conv1d):
    """(batch, L, channels), and not (batch, channels, L), with SiLU; returns what it would keep for the next token as well."""

    def __init__(self, hidden_size, kernel_size):
        super().__init__(hidden_size, hidden_size, kernel_size, groups=hidden_size, padding=kernel_size - 1, bias=False)
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


for _name, _module in {**FLA, **OTHERS}.items():
    globals()[_name].__module__ = _module
