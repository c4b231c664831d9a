"""The steps of a gated delta rule mixer: projections, causal convolution of q, k and v, the rule, gated norm, projection.

The sub-modules are called, so that whatever stands in their place or hangs on them acts.  What reads a mixer works for every
module with the names of flash-linear-attention's GatedDeltaNet and KimiDeltaAttention or of transformers' mixers (Qwen3-Next,
Qwen3.5, OLMo-hybrid; Kimi Delta Attention).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.kernels import gated_delta_rule, gated_delta_rule_update
from compressm.kernels.core.custom_op import transformed
from compressm.layers.mamba2_mixer import without_padding
from compressm.layers.mamba_mixer import Convolution, convolve, convolve_step, decay

Mixer = Any  # a module with those names
EPS = 1e-6  # of the lengths of queries and keys


class DeltaLayout(NamedTuple):
    """How the channels of a mixer are divided.

    Attributes:
        key_heads, heads: H of queries and keys, and HV of values.
        features: K, channels of a query or key behind the convolution.
        values: V.
    """

    key_heads: int
    heads: int
    features: int
    values: int

    @property
    def convolved(self) -> tuple[int, int, int]:
        """Channels of q, k and v, as the convolution has them."""
        keys = self.key_heads * self.features
        return keys, keys, self.heads * self.values


class DeltaInputs(NamedTuple):
    """What the rule of a mixer takes.

    Attributes:
        q, k: (B, L, H, K), of length one, or of the states that maps make of them.
        v: (B, L, HV, V).
        g: (B, L, HV), log decays; (B, L, HV, K) where every channel has one.
        beta: (B, L, HV).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


def layout(mixer: Mixer) -> DeltaLayout:
    """How a mixer's channels are divided, read from its parameters and numbers of heads."""
    heads = mixer.A_log.shape[0] if hasattr(mixer, "A_log") else mixer.num_heads
    key_heads = mixer.num_k_heads if hasattr(mixer, "num_k_heads") else mixer.num_heads
    values = output_projection(mixer).weight.shape[1] // heads
    if hasattr(mixer, "conv1d"):
        keys = (mixer.conv1d.weight.shape[0] - heads * values) // 2
    else:
        keys = mixer.k_conv1d.weight.shape[0]
    return DeltaLayout(key_heads, heads, keys // key_heads, values)


def output_projection(mixer: Mixer) -> Any:
    """The projection behind the norm."""
    return mixer.out_proj if hasattr(mixer, "out_proj") else mixer.o_proj


def states(mixer: Mixer) -> int:
    """Rows of a head's state."""
    maps: Tensor | None = getattr(mixer, "k_map", None)
    return layout(mixer).features if maps is None else maps.shape[1]


def mix(
    mixer: Mixer, hidden_states: Tensor, cache: tuple[Tensor, Tensor] | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The whole mixer from a zero state, (B, L, d_model) -> (B, L, d_model).

    Args:
        cache: (last inputs of the convolution (B, channels, width), state (B, HV, K, V)), which are written.
        cu_seqlens: of several sequences along L in a batch of 1, as :func:`compressm.kernels.gated_delta_rule` takes it.
    """
    mixed, z, b, a = project(mixer, hidden_states)
    if cache is not None:
        width = cache[0].shape[-1]
        cache[0].copy_(F.pad(mixed.mT.detach(), (width, 0))[..., mixed.shape[1] :])
    inputs = rule_inputs(mixer, convolve_all(mixer, mixed, cu_seqlens), b, a)
    out, last = rule(mixer, inputs, output_final_state=cache is not None, cu_seqlens=cu_seqlens)
    if cache is not None:
        assert last is not None  # asked for
        cache[1].copy_(last.detach())
    return finish(mixer, out, z)


def step(mixer: Mixer, hidden_states: Tensor, conv_state: Tensor, state: Tensor) -> Tensor:
    """One token (B, 1, d_model) -> (B, 1, d_model); conv_state (B, channels, width), state (B, HV, K, V) in place."""
    mixed, z, b, a = project(mixer, hidden_states)
    parts, begin = [], 0
    for conv, size in _convolutions(mixer):
        parts.append(convolve_step(conv, mixed[:, 0, begin : begin + size], conv_state[:, begin : begin + size]))
        begin += size
    out = rule_step(mixer, rule_inputs(mixer, torch.cat(parts, -1)[:, None], b, a), state)
    return finish(mixer, out, z)


def rule_step(mixer: Mixer, inputs: DeltaInputs, state: Tensor) -> Tensor:
    """One step of the rule, (B, 1, HV, V); state (B, HV, K, V) is advanced in place."""
    one = DeltaInputs(*(part[:, 0] for part in inputs))
    return gated_delta_rule_update(state, *one, scale=_scale(mixer))[:, None]


def rule(mixer: Mixer, inputs: DeltaInputs, **options: Any) -> tuple[Tensor, Tensor | None]:
    """The rule of a mixer on its inputs, queries scaled as at the full number of channels: (B, L, HV, V), final states."""
    return gated_delta_rule(*inputs, scale=_scale(mixer), **options)


def read(mixer: Mixer, hidden_states: Tensor, mask: Tensor | None = None) -> DeltaInputs:
    """What a mixer's rule takes of hidden states (B, L, d_model).

    mask: (B, L), zero where a token is padding; None: no padding.
    """
    mixed, _, b, a = project(mixer, hidden_states, mask)
    return rule_inputs(mixer, convolve_all(mixer, mixed), b, a)


def project(
    mixer: Mixer, hidden_states: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Of hidden states (B, L, d_model): q, k and v in front of their convolution (B, L, channels), the output's gate
    (B, L, HV, V) or None, and what beta and the decays are made of, (B, L, HV) each, or (B, L, HV, K) where every channel has a
    decay; without an A_log these are whole."""
    x, sizes = without_padding(hidden_states, mask), layout(mixer)
    z: Tensor | None
    if hasattr(mixer, "in_proj_qkvz"):
        mixed, z, b, a = _interleaved(mixer.in_proj_qkvz(x), mixer.in_proj_ba(x), sizes)
    elif hasattr(mixer, "in_proj_qkv"):
        mixed, z, b, a = mixer.in_proj_qkv(x), mixer.in_proj_z(x), mixer.in_proj_b(x), mixer.in_proj_a(x)
    else:
        mixed, b = torch.cat([mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)], -1), mixer.b_proj(x)
        z = mixer.g_b_proj(mixer.g_a_proj(x)) if hasattr(mixer, "g_a_proj") else None
        z = mixer.g_proj(x) if hasattr(mixer, "g_proj") else z
        if hasattr(mixer, "forget_gate"):
            a = mixer.forget_gate(x)
        elif hasattr(mixer, "f_proj"):
            a = mixer.f_proj(x).unflatten(-1, (sizes.heads, -1))
        else:
            a = mixer.a_proj(x) if hasattr(mixer, "a_proj") else torch.zeros_like(b)
    return mixed, None if z is None else z.unflatten(-1, (sizes.heads, sizes.values)), b, a


def convolve_all(mixer: Mixer, mixed: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """silu(causal convolution) of q, k and v (B, L, channels)."""
    parts, begin = [], 0
    for conv, size in _convolutions(mixer):
        parts.append(convolve(conv, mixed[..., begin : begin + size].mT, cu_seqlens).mT)
        begin += size
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def rule_inputs(mixer: Mixer, convolved: Tensor, b: Tensor, a: Tensor) -> DeltaInputs:
    """The inputs of the rule: q and k of length one, through the mixer's maps if it has them; decays and beta."""
    sizes = layout(mixer)
    q, k, v = convolved.split(sizes.convolved, dim=-1)
    q, k = (unit(part.unflatten(-1, (sizes.key_heads, sizes.features))) for part in (q, k))
    g = _log_decays(mixer, a) if hasattr(mixer, "A_log") else a
    if getattr(mixer, "k_map", None) is not None:
        map_ = contracted(mixer)
        q = torch.einsum("blhk,hrk->blhr", q, mixer.q_map.to(q.dtype))
        k = torch.einsum("blhk,hrk->blhr", k, map_.to(k.dtype))
        if of_channels(mixer):
            g = shared_decays(g, map_)
    beta = b.sigmoid() * (2 if getattr(mixer, "allow_neg_eigval", False) else 1)
    return DeltaInputs(q, k, v.unflatten(-1, (sizes.heads, sizes.values)), g, beta)


def shared_decays(g: Tensor, maps: Tensor) -> Tensor:
    """Log decays (B, L, H, r) of the rows of maps of keys (H, r, K), of those of channels (B, L, H, K): a row decays like the
    channels that it mixes, by their shares in it."""
    shares = maps.square()
    return torch.einsum("blhk,hrk->blhr", g, (shares / shares.sum(-1, keepdim=True)).to(g.dtype))


def of_channels(mixer: Mixer) -> bool:
    """Whether every channel of the keys has a decay of its own, as in Kimi Delta Attention."""
    return hasattr(mixer, "forget_gate") or hasattr(mixer, "f_proj")


def _log_decays(mixer: Mixer, a: Tensor) -> Tensor:
    rates, bias = decay(mixer), mixer.dt_bias
    if a.dim() == 4:
        rates, bias = rates[:, None], bias.view(a.shape[2:])
    logits = a.to(rates.dtype) + bias
    least: float | None = getattr(mixer, "lower_bound", None)
    return rates * F.softplus(logits) if least is None else least * torch.sigmoid(-rates * logits)


def unit(x: Tensor) -> Tensor:
    """Vectors (..., K) of length one, computed in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + EPS)).to(x.dtype)


def contracted(mixer: Mixer) -> Tensor:
    """:func:`contraction` of a mixer's map of keys; where nothing is trained, that of the last call while the map is the same.

    Its numbers are compared, which costs little beside the eigenvalues: every write into the map is heard, by whatever way.
    """
    maps: Tensor = mixer.k_map
    trained = (maps.requires_grad and torch.is_grad_enabled()) or transformed() or torch._C._are_functorch_transforms_active()
    if trained or torch.compiler.is_compiling() or type(maps) not in (Tensor, nn.Parameter):
        return contraction(maps)
    seen: tuple[Tensor, Tensor] | None = vars(mixer).get("_contracted")
    if seen is None or (seen[0].device, seen[0].dtype) != (maps.device, maps.dtype) or not torch.equal(seen[0], maps):
        with torch.inference_mode(False), torch.no_grad():  # what is kept must do outside of inference mode as well
            kept = maps.clone()
            seen = kept, contraction(kept)
        mixer._contracted = seen
    return seen[1]


def contraction(maps: Tensor) -> Tensor:
    """Maps (H, r, K) divided by their largest singular value where it exceeds one.

    A key k is erased by I - beta k k^T, which is stable for beta |k|^2 <= 2: no key may become longer.
    """
    with torch.no_grad():
        wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
        largest = torch.linalg.eigvalsh(wide @ wide.mT)[:, -1:, None].clamp_min(1).sqrt()
    return maps / largest.to(maps.dtype)


def finish(mixer: Mixer, out: Tensor, z: Tensor | None) -> Tensor:
    """Norm with the gate and projection behind the rule's output (B, L, HV, V)."""
    return output_projection(mixer)(normed(mixer, out, z))


def normed(mixer: Mixer, out: Tensor, z: Tensor | None) -> Tensor:
    """What the output projection gets of the rule's output (B, L, HV, V): through the norm, with the gate, (B, L, HV V)."""
    norm = mixer.norm if hasattr(mixer, "norm") else mixer.o_norm
    return (norm(out) if z is None else norm(out.flatten(0, -2), z.flatten(0, -2)).view_as(out)).flatten(-2)


def _scale(mixer: Mixer) -> float:
    """Of queries, by their channels in front of maps."""
    return float(layout(mixer).features ** -0.5)


def _interleaved(qkvz: Tensor, ba: Tensor, sizes: DeltaLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Qwen3-Next's projections, which hold q, k, v, z and b, a of one head of keys after those of the other."""
    share = sizes.heads // sizes.key_heads
    widths = [sizes.features, sizes.features, share * sizes.values, share * sizes.values]
    q, k, v, z = (part.flatten(-2) for part in qkvz.unflatten(-1, (sizes.key_heads, sum(widths))).split(widths, -1))
    b, a = (part.flatten(-2) for part in ba.unflatten(-1, (sizes.key_heads, 2 * share)).split(share, -1))
    return torch.cat([q, k, v], -1), z, b, a


def _convolutions(mixer: Mixer) -> list[tuple[Any, int]]:
    """What :func:`~compressm.layers.mamba_mixer.convolve` takes for the channels of q, k and v, and their numbers."""
    sizes = layout(mixer).convolved
    if hasattr(mixer, "conv1d"):
        return [(mixer, sum(sizes))]
    parts = mixer.q_conv1d, mixer.k_conv1d, mixer.v_conv1d
    return [(Convolution(conv), size) for conv, size in zip(parts, sizes, strict=True)]
