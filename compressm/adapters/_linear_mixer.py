"""What a linear attention layer does with its queries and keys, read from names.

They are those of flash-linear-attention's LinearAttention, SimpleGatedLinearAttention, GatedLinearAttention and
MultiScaleRetention, which ours has as well, and of transformers' xLSTMLayer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters import _rotary as rotary
from compressm.adapters.parameters import own_parameter, precision
from compressm.layers.mamba2_mixer import without_padding
from compressm.layers.mamba_mixer import Convolution, convolve

NORMS = ("g_norm_swish_gate", "g_norm", "norm")  # names of what stands behind the heads
Mixer = Any  # a module with those names
Sections = dict[str, tuple[tuple[str, int], ...]]


class LinearLayout(NamedTuple):
    """How the channels of a layer are divided.

    Attributes:
        key_heads, heads: H of keys and values, and of queries and states, whose head h goes with key head h // (heads / H).
        features: K, channels of a query or key.
        values: V.
    """

    key_heads: int
    heads: int
    features: int
    values: int


def layout(mixer: Mixer) -> LinearLayout:
    """How a layer's channels are divided, read from its parameters and numbers of heads."""
    heads = mixer.num_heads if hasattr(mixer, "num_heads") else mixer.config.num_heads
    key_heads = getattr(mixer, "num_kv_heads", None) or heads
    values = (mixer.o_proj if hasattr(mixer, "o_proj") else mixer.out_proj).weight.shape[1]
    if fused(mixer):
        keys = own_parameter(mixer, "qkv_opreact.weight").shape[0] // 2 - values
    else:
        keys = own_parameter(mixer, f"{projections(mixer)[0]}.weight").shape[0]
    return LinearLayout(key_heads, heads, keys // heads, values // heads)


def fused(mixer: Mixer) -> bool:
    """Whether one projection makes queries, keys, values and the output's gate."""
    return "qkv_opreact" in mixer._modules


def projections(mixer: Mixer) -> tuple[str, ...]:
    """Names of what projects to queries and keys."""
    if fused(mixer):
        return ("qkv_opreact",)
    return ("q_proj", "k_proj") if "q_proj" in mixer._modules else ("q", "k")


def convolved(mixer: Mixer) -> bool:
    """Whether convolutions stand between projections and states."""
    return "q_conv1d" in mixer._modules


def of_channels(mixer: Mixer) -> bool:
    """Whether every channel of the keys has a decay of its own."""
    return isinstance(getattr(mixer, "gk_proj", None), nn.Sequential)


def sections(mixer: Mixer) -> Sections:
    """By parameter, what its first axis holds: of queries (``"q"``), keys (``"k"``), their decays (``"g"``) or others (``""``),
    and how many rows in a row."""
    sizes = layout(mixer)
    queries, keys = ("q", sizes.heads * sizes.features), ("k", sizes.key_heads * sizes.features)
    parts: dict[str, tuple[tuple[str, int], ...]]
    if fused(mixer):
        parts = {"qkv_opreact": (queries, keys, ("", 2 * sizes.heads * sizes.values))}
    else:
        parts = dict(zip(projections(mixer), ((queries,), (keys,)), strict=True))
    if of_channels(mixer):
        parts["gk_proj.1"] = (("g", keys[1]),)
    if convolved(mixer):
        parts |= {"q_conv1d": (queries,), "k_conv1d": (keys,)}
    biased = {part: getattr(mixer.get_submodule(part), "bias", None) is not None for part in parts}
    return {
        f"{part}.{leaf}": rows for part, rows in parts.items() for leaf in (("weight", "bias") if biased[part] else ("weight",))
    }


def rescaled(mixer: Mixer) -> bool:
    """Whether queries are divided by the root of their number of channels."""
    return getattr(mixer, "scale", None) is None


def obstacle(mixer: Mixer) -> str:
    """Why a layer cannot have fewer channels of keys, in words; empty: it can."""
    if rotary.turning(mixer) and (words := rotary.obstacle(mixer)):
        return words
    maps = [getattr(mixer, name, None) for name in ("feature_map_fn", "feature_map_q", "feature_map_k")]
    if any(map_ is not None and not isinstance(map_, nn.Identity) for map_ in maps):
        return "it has a feature map behind the projections, expected none (feature_map 'identity')"
    if getattr(mixer, "norm_q", False) or getattr(mixer, "norm_k", False):
        return "it divides queries or keys by their sums (norm_q, norm_k)"
    if convolved(mixer) and rescaled(mixer) and not getattr(mixer, "output_norm", True):
        return "its convolutions have SiLU behind them and no norm takes out the scale K^-0.5 of its queries (pass scale=)"
    return ""


def features(mixer: Mixer, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries (batch, L, heads, K) and keys (batch, L, key heads, K) of hidden states (batch, L, d_model).

    mask: (batch, L), zero where a token is padding; None: no padding.
    """
    sizes, hidden = layout(mixer), without_padding(hidden, mask)
    parts = [mixer.get_submodule(name)(hidden) for name in projections(mixer)]
    if fused(mixer):
        count = sizes.heads * sizes.features
        parts = list(parts[0][..., : 2 * count].split(count, -1))
    if convolved(mixer):
        parts = [convolve(Convolution(mixer.get_submodule(f"{n}_conv1d")), x.mT).mT for n, x in zip("qk", parts, strict=True)]
    q, k = (x.unflatten(-1, (-1, sizes.features)) for x in parts)
    return q, k


def values(mixer: Mixer, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Values (batch, L, key heads, V), zero where a token is padding."""
    v = mixer.v_proj(without_padding(hidden, mask))
    if convolved(mixer):
        v = convolve(Convolution(mixer.v_conv1d), v.mT).mT
    return without_padding(v, mask).unflatten(-1, (-1, layout(mixer).values))


def log_decays(mixer: Mixer, hidden: Tensor) -> Tensor | None:
    """Of a step, per head (H,) or (batch, L, H) or per channel (batch, L, key heads, K); None: nothing decays."""
    if "gk_proj" in mixer._modules:
        g = of_logits(mixer, mixer.gk_proj(hidden))
        return g.unflatten(-1, (-1, layout(mixer).features)) if of_channels(mixer) else g
    if "fgate_preact" in mixer._modules or fused(mixer):
        cap, heads = mixer.config.gate_soft_cap, layout(mixer).heads
        logits = mixer.ifgate_preact(hidden)[..., heads:] if fused(mixer) else mixer.fgate_preact(hidden)
        return F.logsigmoid(cap * torch.tanh(logits / cap))
    if any(kind.__name__ == "MultiScaleRetention" for kind in type(mixer).__mro__):
        return torch.log1p(-torch.exp2(-5.0 - torch.arange(layout(mixer).heads, device=hidden.device)))
    fixed: Tensor | None = getattr(mixer, "log_decay", None)
    return fixed


def of_logits(mixer: Mixer, logits: Tensor) -> Tensor:
    """The log decays that a layer makes of what ``gk_proj`` gives."""
    g = F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))) / mixer.gate_logit_normalizer
    return g if getattr(mixer, "clamp_min", None) is None else g.clamp_min(mixer.clamp_min)


def output_gate(mixer: Mixer, hidden: Tensor) -> Tensor | None:
    """What gates the heads' outputs, (batch, L, heads, V), in front of its activation; None if there is no gate."""
    return mixer.g_proj(hidden).unflatten(-1, (layout(mixer).heads, -1)) if "g_proj" in mixer._modules else None


def normed(mixer: Mixer, out: Tensor, gate: Tensor | None) -> Tensor:
    """What the output projection gets of the heads' outputs (batch, L, heads, V): through the norm, with the gate."""
    norm = next((mixer.get_submodule(name) for name in NORMS if name in mixer._modules), nn.Identity())
    if gate is None or hasattr(mixer, "gate_fn"):  # the gate stands behind the norm, and not within
        out = norm(out.to(precision(norm, out.dtype))).flatten(-2)
        return out if gate is None else out * mixer.gate_fn(gate.flatten(-2))
    return norm(out, gate).flatten(-2)
