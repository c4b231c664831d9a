"""Triton backend of linear attention with decays of key channels: the gated delta rule's kernels, where nothing is erased."""

# mypy: ignore-errors
from __future__ import annotations

import torch
from torch import Tensor

from compressm.kernels.core import triton_language
from compressm.kernels.core.custom_op import recomputed_gradients
from compressm.kernels.gated_delta_rule import triton_call as shared
from compressm.kernels.gated_delta_rule import triton_channels_launch as channels
from compressm.kernels.gated_delta_rule.triton_launch import plan, why_not
from compressm.kernels.linear_attention import reference

__all__ = ["backward", "forward", "plan", "why_not"]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    config: shared.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, final states), as :func:`compressm.kernels.linear_attention.op.linear_attention_op`."""
    if shared.empty(q, v, cu_seqlens):
        out, last = reference.linear_attention(q, k, v, g, initial_state, cu_seqlens, scale)
        return out.contiguous(), last.contiguous()
    call = shared.call_of(q, k, v, cu_seqlens, config)
    out = v.new_empty(v.shape)
    with triton_language.on_device(v):
        operands = channels.operands_of(_given(q, k, g, scale), call)
        states, writes, last = shared.states_of(v, operands, call, initial_state, cu_seqlens)
        shared.outputs(operands, writes, states, out, call)
    return out, last


def backward(
    grad_out: Tensor | None,
    grad_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    config: shared.Config | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of (q, k, v, g, initial_state), contiguous; empty for an initial state that was None.

    All sums have a fixed order: the same bits every time.
    """
    if shared.empty(q, v, cu_seqlens):
        return recomputed_gradients(
            lambda *tensors: reference.linear_attention(*tensors, cu_seqlens, scale),
            (q, k, v, g, initial_state),
            (grad_out, grad_last),
        )
    if grad_out is None:
        grad_out = v.new_zeros(()).expand(v.shape)
    call = shared.call_of(q, k, v, cu_seqlens, config)
    given = _given(q, k, g, scale)
    with triton_language.on_device(v):
        operands = channels.operands_of(given, call)
        states, writes, last = shared.states_of(v, operands, call, initial_state, cu_seqlens)
        grad_states, grad_v, grad_start = shared.reverse(grad_out, operands, call, grad_last, torch.empty_like(last))
        pairs = shared.pairs_of(grad_out, writes, grad_v, operands, call)
        found = channels.gradients_of(given, operands, grad_out, grad_v, writes, pairs, states, grad_states, call)
    (grad_q, grad_k), grad_g, _ = found
    start = v.new_empty((0,)) if initial_state is None else grad_start.to(initial_state.dtype)
    return grad_q.contiguous(), grad_k.contiguous(), grad_v.to(v.dtype), grad_g.contiguous(), start


def _given(q: Tensor, k: Tensor, g: Tensor, scale: float) -> channels.Given:
    return channels.Given(q, k, g, None, None, None, scale, False)
