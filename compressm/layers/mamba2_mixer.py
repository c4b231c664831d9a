"""The steps of a Mamba-2 mixer: projection, causal convolution of x, B and C, scan with heads, gated norm, projection.

The sub-modules are called, so that whatever stands in their place or hangs on them acts.  What reads a mixer works for every
module with mamba_ssm's or transformers' names.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from compressm.kernels import selective_state_update, ssd
from compressm.layers.mamba_mixer import convolve, convolve_step, decay

NO_LIMIT = (0.0, float("inf"))
Mixer = Any  # a module with the names of mamba_ssm's or transformers'


class Layout(NamedTuple):
    """How the channels of a mixer are divided.

    Attributes:
        heads, headdim: H and P; the scan has H P channels.
        groups: G, of heads that share B and C.
        features: N, channels of B and of C in every group.
    """

    heads: int
    headdim: int
    groups: int
    features: int

    @property
    def channels(self) -> int:
        """Channels that go through the scan."""
        return self.heads * self.headdim

    @property
    def convolved(self) -> tuple[int, int, int]:
        """Channels of x, B and C, as the convolution has them."""
        shared = self.groups * self.features
        return self.channels, shared, shared

    def projected(self, rows: int) -> tuple[int, int, int, int, int]:
        """Rows of a projection that has ``rows`` of them: two for a gated MLP beside the scan, z, what is convolved, dt."""
        inner = sum(self.convolved)
        mlp = (rows - self.channels - inner - self.heads) // 2
        return mlp, mlp, self.channels, inner, self.heads


class ScanInputs(NamedTuple):
    """What the scan of a mixer takes.

    Attributes:
        x: (..., H, P).
        B, C: (..., G, states).
    """

    x: Tensor
    B: Tensor
    C: Tensor


def layout(mixer: Mixer) -> Layout:
    """How a mixer's channels are divided, read from its parameters, heads and groups."""
    heads = mixer.A_log.shape[0]
    headdim = mixer.headdim if hasattr(mixer, "headdim") else mixer.head_dim
    groups = mixer.ngroups if hasattr(mixer, "ngroups") else mixer.n_groups
    return Layout(heads, headdim, groups, (mixer.conv1d.weight.shape[0] - heads * headdim) // (2 * groups))


def states(mixer: Mixer) -> int:
    """States N per channel of a mixer's scan."""
    maps: Tensor | None = getattr(mixer, "B_map", None)
    return layout(mixer).features if maps is None else maps.shape[1]


def mix(
    mixer: Mixer, hidden_states: Tensor, cache: tuple[Tensor, Tensor] | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The whole mixer from a zero state, (B, L, d_model) -> (B, L, d_model).

    Args:
        cache: (last inputs of the convolution (B, channels, width), state (B, H, P, N)), which are written.
        cu_seqlens: of several sequences along L in a batch of 1, as :func:`compressm.kernels.ssd` takes it.
    """
    sizes = layout(mixer)
    z0, x0, z, xBC, dt = _split(mixer, mixer.in_proj(hidden_states), sizes)
    if cache is not None:
        width = cache[0].shape[-1]
        cache[0].copy_(F.pad(xBC.mT.detach(), (width, 0))[..., xBC.shape[1] :])
    x, B, C = scan_inputs(mixer, convolve(mixer, xBC.mT, cu_seqlens).mT, sizes)
    result: Any = ssd(
        x, dt, decay(mixer), B, C, mixer.chunk_size, mixer.D.view(sizes.heads, -1).squeeze(-1), gate(mixer, z, sizes),
        mixer.dt_bias, dt_softplus=True, dt_limit=mixer.dt_limit, cu_seqlens=cu_seqlens,
        return_final_states=cache is not None,
    )  # fmt: skip
    if cache is not None:
        result, last = result
        cache[1].copy_(last.detach())
    return _finish(mixer, result.flatten(-2), z0, x0, z)


def step(mixer: Mixer, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
    """One token (B, 1, d_model) -> (B, 1, d_model); conv_state (B, channels, width), ssm_state (B, H, P, N) in place."""
    sizes = layout(mixer)
    z0, x0, z, xBC, dt = _split(mixer, mixer.in_proj(hidden_states[:, 0]), sizes)
    inputs = scan_inputs(mixer, convolve_step(mixer, xBC, conv_state), sizes)
    y = scan_step(mixer, inputs, dt, gate(mixer, z, sizes), ssm_state)
    return _finish(mixer, y.flatten(-2), z0, x0, z).unsqueeze(1)


def scan_step(mixer: Mixer, inputs: ScanInputs, dt: Tensor, z: Tensor | None, state: Tensor) -> Tensor:
    """One step of the scan, (B, H, P), of inputs (B, ...), dt (B, H) and the scan's own gate z; state (B, H, P, N) in place."""
    heads, headdim = state.shape[1:3]
    bias: Tensor | None = mixer.dt_bias
    softplus = limits(mixer) == NO_LIMIT
    if not softplus:
        dt, bias = F.softplus(dt.to(decay(mixer).dtype) + mixer.dt_bias).clamp(*limits(mixer)), None
    A = decay(mixer)[:, None, None].expand(state.shape[1:])
    D = mixer.D.view(heads, -1).expand(heads, headdim)
    bias = None if bias is None else bias[:, None].expand_as(D)
    dt = dt[..., None].expand_as(inputs.x)
    return selective_state_update(state, inputs.x, dt, A, inputs.B, inputs.C, D, z, bias, dt_softplus=softplus)


def read(
    mixer: Mixer, hidden_states: Tensor, mask: Tensor | None = None, projected: Tensor | None = None
) -> tuple[ScanInputs, Tensor]:
    """What a mixer's scan takes of hidden states (B, L, d_model), and its step sizes (B, L, H) as the projection leaves them.

    Args:
        mask: (B, L), zero where a token is padding, whose x, B and C are zero; None: no padding.
        projected: what ``in_proj`` made of them, (B, L, rows), if that is known.
    """
    _, xBC, dt = project(mixer, hidden_states, mask, projected)
    return scan_inputs(mixer, without_padding(convolve(mixer, xBC.mT).mT, mask), layout(mixer)), dt


def project(
    mixer: Mixer, hidden_states: Tensor, mask: Tensor | None = None, projected: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate z (B, L, H P), what is convolved (B, L, channels) and step sizes (B, L, H) of hidden states (B, L, d_model).

    Args:
        mixer: transformers' FalconH1Mixer has multipliers in front of its projection (``ssm_in_multiplier``) and behind it
            (``mup_vector``), of which any mixer may have either.
        mask, projected: as for :func:`read`.
    """
    if projected is None:
        projected = mixer.in_proj(without_padding(hidden_states, mask) * getattr(mixer, "ssm_in_multiplier", 1))
    if getattr(mixer, "mup_vector", None) is not None:
        projected = projected * mixer.mup_vector
    z, xBC, dt = _split(mixer, projected, layout(mixer))[2:]
    return z, xBC, dt


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (B, L, channels), zero where mask (B, L) is; None: no padding."""
    return x if mask is None else (x * mask[..., None]).to(x.dtype)


def limits(mixer: Mixer) -> tuple[float, float]:
    """The range that a mixer's step sizes are cut to."""
    low, high = mixer.dt_limit if hasattr(mixer, "dt_limit") else mixer.time_step_limit
    return float(low), float(high)


def scan_inputs(mixer: Mixer, xBC: Tensor, sizes: Layout) -> ScanInputs:
    """x, B and C of the convolution's output (..., channels), B and C through the mixer's maps if it has them.

    Classes whose forward comes here say ``takes_maps = True``.
    """
    x, B, C = xBC.split(sizes.convolved, dim=-1)
    B, C = (part.unflatten(-1, (sizes.groups, sizes.features)) for part in (B, C))
    if getattr(mixer, "B_map", None) is not None:
        B, C = _mapped(B, mixer.B_map), _mapped(C, mixer.C_map)
    return ScanInputs(x.unflatten(-1, (sizes.heads, sizes.headdim)), B, C)


def _mapped(features: Tensor, maps: Tensor) -> Tensor:
    """(..., G, N) by maps (G, r, N) -> (..., G, r)."""
    return torch.einsum("...gn,grn->...gr", features, maps)


def _split(mixer: Mixer, projected: Tensor, sizes: Layout) -> tuple[Tensor, ...]:
    return projected.split(sizes.projected(projected.shape[-1]), dim=-1)


def normed(mixer: Mixer) -> bool:
    """Whether a norm behind the scan has the gate; else the scan has it."""
    return getattr(mixer, "rmsnorm", getattr(mixer, "mamba_rms_norm", True))


def gate(mixer: Mixer, z: Tensor, sizes: Layout) -> Tensor | None:
    """The gate of the scan itself, (..., H, P); None where a norm has it."""
    return None if normed(mixer) else z.unflatten(-1, (sizes.heads, sizes.headdim))


def _finish(mixer: Mixer, y: Tensor, z0: Tensor, x0: Tensor, z: Tensor) -> Tensor:
    """Norm, gated MLP and projection behind the scan's output y (..., H P)."""
    y = mixer.norm(y, z) if normed(mixer) else y
    if z0.shape[-1]:
        y = torch.cat([F.silu(z0) * x0, y], dim=-1)
    return mixer.out_proj(y)
