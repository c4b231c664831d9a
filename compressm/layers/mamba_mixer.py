"""The steps of a Mamba-1 mixer, for every module that has mamba_ssm's names: ours, mamba_ssm's own, transformers'.

``projection -> causal convolution -> selection -> scan -> projection``.  The sub-modules are called, so that whatever stands
in their place or hangs on them acts: adapters, hooks, pruning masks, parametrizations, quantised layers.  Where one is plain,
an op may take its parameters instead, which gives the same numbers faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.kernels import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update
from compressm.kernels.fused_cpu.mamba_mixer import mamba_mixer
from compressm.layers._plain import plain
from compressm.layers.step_sizes import StepSizes

SILU = ("silu", "swish")
Mixer = Any  # a module with the names of mamba_ssm's


class Selection(NamedTuple):
    """What a mixer makes of its tokens for the scan.

    Attributes:
        dt: step sizes in front of their softplus, (..., d_inner), and of ``dt_bias``.
        B, C: (..., N).
        dt_bias: (d_inner,), still to be added to ``dt``; None where ``dt`` has it.
    """

    dt: Tensor
    B: Tensor
    C: Tensor
    dt_bias: Tensor | None


class Convolution(NamedTuple):
    """One of several, where a mixer would have one."""

    conv1d: Any


def mix(
    mixer: Mixer,
    hidden_states: Tensor,
    cache: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    convolution: Callable[..., Any] = causal_conv1d,
    scan: Callable[..., Any] = selective_scan,
) -> Tensor:
    """The whole mixer from a zero state, (B, L, d_model) -> (B, L, d_model).

    Args:
        cache: (last inputs of the convolution (B, d_inner, width), state (B, d_inner, N)), which are written.
        cu_seqlens: of several sequences along L in a batch of 1, as :func:`compressm.kernels.selective_scan` takes it.
        convolution, scan: with the arguments of the default ones.
    """
    if cache is None and cu_seqlens is None and (convolution, scan) == (causal_conv1d, selective_scan):
        out = _in_one_op(mixer, hidden_states)
        if out is not None:
            return out
    x, z = project(mixer, hidden_states)
    if cache is not None:
        width = cache[0].shape[-1]
        cache[0].copy_(F.pad(x.detach(), (width, 0))[..., x.shape[-1] :])
    x = convolve(mixer, x, cu_seqlens, convolution=convolution)
    dt, B, C, dt_bias = select(mixer, x.mT)
    result = scan(
        x, dt.mT, decay(mixer), B.mT, C.mT, mixer.D, z, dt_bias, delta_softplus=True, return_last_state=cache is not None,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    if cache is not None:
        result, last = result
        cache[1].copy_(last.detach())
    return mixer.out_proj(result.mT)


def _in_one_op(mixer: Mixer, hidden_states: Tensor) -> Tensor | None:
    """None where the steps have to run one by one: the op does not run, or a module is more than its parameters."""
    if torch.compiler.is_compiling() or not getattr(mixer, "use_fast_path", True):
        return None
    in_proj, x_proj, dt_proj, out_proj, conv = mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj, mixer.conv1d
    if not all(plain(linear, nn.Linear) for linear in (in_proj, x_proj, out_proj)) or not plain(conv, nn.Conv1d):
        return None
    silu = getattr(mixer, "activation", "silu") in SILU
    if not silu or not plain(dt_proj, nn.Linear, StepSizes) or x_proj.bias is not None or dt_proj.bias is None:
        return None
    return mamba_mixer(
        hidden_states, in_proj.weight, in_proj.bias, conv.weight, conv.bias, x_proj.weight, dt_proj.weight, dt_proj.bias,
        mixer.A_log, mixer.D, out_proj.weight, out_proj.bias,
    )  # fmt: skip


def step(mixer: Mixer, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
    """One token (B, 1, d_model) -> (B, 1, d_model); conv_state (B, d_inner, width) and ssm_state (B, d_inner, N) in place."""
    x, z = mixer.in_proj(hidden_states[:, 0]).chunk(2, dim=-1)
    x = convolve_step(mixer, x, conv_state)
    dt, B, C, dt_bias = select(mixer, x)
    y = selective_state_update(ssm_state, x, dt, decay(mixer), B, C, mixer.D, z, dt_bias, dt_softplus=True)
    return mixer.out_proj(y).unsqueeze(1)


def scan_inputs(mixer: Mixer, hidden_states: Tensor) -> tuple[Tensor, Selection]:
    """The scan's input (B, d_inner, L), and its step sizes (B, L, d_inner), B and C (B, L, N)."""
    x = convolve(mixer, project(mixer, hidden_states)[0])
    return x, select(mixer, x.mT)


def project(mixer: Mixer, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """x and gate z, (B, d_inner, L) each, of hidden states (B, L, d_model).

    Channels lie next to each other in memory, on a GPU time steps where the projection is plain.
    """
    linear = mixer.in_proj
    if not plain(linear, nn.Linear):
        x, z = linear(hidden_states).chunk(2, dim=-1)
        return x.mT, z.mT
    if hidden_states.is_cuda:
        xz = linear.weight @ hidden_states.mT
        if linear.bias is not None:
            xz = xz + linear.bias.to(xz.dtype)[:, None]
        return xz.chunk(2, dim=1)
    if hidden_states.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
        hidden_states = hidden_states.to(torch.get_autocast_dtype("cpu"))  # once for both halves
    biases = (None, None) if linear.bias is None else linear.bias.chunk(2)
    x, z = (F.linear(hidden_states, *half) for half in zip(linear.weight.chunk(2), biases, strict=True))
    return x.mT, z.mT


def convolve(
    mixer: Mixer,
    x: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    seq_idx: Tensor | None = None,
    convolution: Callable[..., Any] = causal_conv1d,
) -> Tensor:
    """The activated causal convolution of x (B, d_inner, L), zeros in front of every sequence.

    Args:
        cu_seqlens, seq_idx: of packed sequences, one of them, as :func:`compressm.kernels.causal_conv1d` takes them.
        convolution: with that op's arguments.
    """
    conv, silu = mixer.conv1d, getattr(mixer, "activation", "silu") in SILU
    if plain_convolution(conv):
        packed = {"cu_seqlens": cu_seqlens, "seq_idx": seq_idx}
        packed = {name: numbers for name, numbers in packed.items() if numbers is not None}
        out = convolution(x, conv.weight[:, 0], conv.bias, activation="silu" if silu else None, **packed)
        return out if silu else mixer.act(out)
    if seq_idx is not None:
        row = x.transpose(0, 1).reshape(1, x.shape[1], -1)
        return convolve(mixer, row, packing(seq_idx))[0].unflatten(-1, seq_idx.shape).transpose(0, 1)
    pieces = [x] if cu_seqlens is None else x.tensor_split(cu_seqlens[1:-1].cpu(), -1)
    outputs = [conv(piece)[..., : piece.shape[-1]] for piece in pieces if len(pieces) == 1 or piece.shape[-1]]
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    return F.silu(out) if silu else mixer.act(out)


def plain_convolution(conv: nn.Module) -> bool:
    """Whether a causal convolution is no more than its taps and bias: torch's, or flash-linear-attention's with SiLU."""
    short = type(conv).__name__ == "ShortConvolution" and type(conv).__module__.startswith("fla.")
    return plain(conv, nn.Conv1d) or (short and plain(conv, type(conv)) and getattr(conv, "activation", None) in SILU)


def convolve_step(mixer: Mixer, x: Tensor, conv_state: Tensor) -> Tensor:
    """The same of one step x (B, d_inner) behind the last inputs conv_state (B, d_inner, width), which are written."""
    conv, silu = mixer.conv1d, getattr(mixer, "activation", "silu") in SILU
    if plain_convolution(conv):
        out = causal_conv1d_update(x, conv_state, conv.weight[:, 0], conv.bias, activation="silu" if silu else None)
        return out if silu else mixer.act(out)
    width = conv_state.shape[-1]
    inputs = torch.cat([conv_state[..., 1:].to(x.dtype), x.unsqueeze(-1)], -1)
    conv_state.copy_(inputs)
    out = conv(inputs)[..., width - 1]
    return F.silu(out) if silu else mixer.act(out)


def select(mixer: Mixer, x: Tensor) -> Selection:
    """What depends on the token, from the convolution's output x (..., d_inner)."""
    states, linear = mixer.A_log.shape[1], mixer.dt_proj
    mix = mixer.x_proj(x)
    low_rank, B, C = mix.split([mix.shape[-1] - 2 * states, states, states], dim=-1)
    if plain(linear, nn.Linear, StepSizes):
        return Selection(low_rank @ linear.weight.t().contiguous(), B, C, linear.bias)
    return Selection(linear(low_rank), B, C, None)


def decay(mixer: Mixer) -> Tensor:
    """A = -exp(A_log) (d_inner, N), in float32 at least."""
    return -torch.exp(mixer.A_log.to(torch.promote_types(mixer.A_log.dtype, torch.float32)))


def packing(seq_idx: Tensor) -> Tensor:
    """The ``cu_seqlens`` of sequences that are numbered step by step, seq_idx (batch, L), all rows in one.

    A sequence ends where the number changes, and at the end of a row.
    """
    batch, length = seq_idx.shape
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=batch * length)
