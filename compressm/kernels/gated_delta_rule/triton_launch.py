"""Triton backend of the gated delta rule: what runs for which shapes, and the launches.

A sequence is cut into chunks of T steps.  What a chunk's steps write follows from the state in front of it and the inverse of
a triangle (T, T); from chunk to chunk only states pass, one a chunk, which the backward computes once more.  The kernels that
walk from chunk to chunk hold all K rows of some columns of a state; elsewhere K and V are run-time bounds of loops over tiles.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
from torch import Tensor

from compressm.kernels.core import triton_language
from compressm.kernels.core.custom_op import recomputed_gradients
from compressm.kernels.core.plan import KernelPlan
from compressm.kernels.gated_delta_rule import reference
from compressm.kernels.gated_delta_rule import triton_backward as bwd
from compressm.kernels.gated_delta_rule import triton_call as shared
from compressm.kernels.gated_delta_rule import triton_channels_launch as channels
from compressm.kernels.gated_delta_rule import triton_forward as fwd
from compressm.kernels.ssd.triton_chunks import wide

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(device: str, dtype: torch.dtype) -> str | None:
    """None if the Triton kernels run for tensors of this device type and dtype, else the reason."""
    if dtype == torch.float64:
        return "the Triton kernels compute in float32; float64 runs on the reference"
    if dtype not in DTYPES:
        return f"the Triton kernels take {', '.join(str(d) for d in DTYPES)}, not {dtype}"
    return triton_language.why_not(device, fwd._delta_states_kernel)


def plan(keys: int, values: int, dtype: torch.dtype, op: str = "gated_delta_rule") -> KernelPlan:
    """The plan for K, V and inputs of ``dtype``."""
    config = shared.config_of(keys, values, dtype == torch.bfloat16)
    reason = "products and a triangular inverse within chunks, between which tiles of states pass"
    return KernelPlan(op, "triton", "chunks", tuple(sorted(config.items())), reason)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    normalize: bool,
    config: shared.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """(o, final states), as :func:`compressm.kernels.gated_delta_rule.op.gated_delta_rule_op`."""
    if shared.empty(q, v, cu_seqlens):
        o, last = reference.gated_delta_rule(q, k, v, g, beta, initial_state, cu_seqlens, scale, normalize)
        return o.contiguous(), last.contiguous()
    call = shared.call_of(q, k, v, cu_seqlens, config)
    o = v.new_empty(v.shape)
    with triton_language.on_device(v):
        lengths = shared.lengths_of(q, k) if normalize else [None, None]
        operands = prepare(q, k, g, beta, call, scale, lengths)
        states, writes, last = shared.states_of(v, operands, call, initial_state, cu_seqlens)
        shared.outputs(operands, writes, states, o, call)
    return o, last


def prepare(
    q: Tensor, k: Tensor, g: Tensor, beta: Tensor, call: shared.Call, scale: float, lengths: list[Tensor] | list[None]
) -> shared.Operands:
    """The operands; lengths: :func:`triton_call.lengths_of` q and k, or two None."""
    if g.dim() == 4:
        return channels.operands_of(channels.Given(q, k, g, beta, *lengths, scale, True), call)
    chunks, (length, row, heads), T = call.chunks, call.sizes, call.config["T"]
    own = heads // q.shape[2]
    rows = g.new_empty((chunks.count, heads, 7, T), dtype=torch.float32)
    passing = rows.new_empty((chunks.count, heads))
    fwd._delta_rows_kernel[(chunks.count * -(-heads // shared.HEADS),)](
        g, beta, *lengths, chunks.starts, chunks.counts, rows, passing, length, row, heads, own, scale,
        *g.stride(), *beta.stride(), BH=shared.HEADS, T=T, **shared.SMALL,
    )  # fmt: skip
    erased = rows.new_empty((chunks.count, heads, T, T))
    reads = erased.new_empty(erased.shape, dtype=call.dtype)
    fwd._delta_products_kernel[(chunks.count * q.shape[2],)](
        q, k, rows, chunks.starts, chunks.counts, reads, erased, length, row, heads, own, call.K, *q.stride(), *k.stride(),
        WIDE_K=wide(q, k), **call.options("BN"),
    )  # fmt: skip
    return shared.Operands(q, k, k, own, rows, passing, reads, erased, shared.inverse_of(erased, call))


def backward(
    grad_o: Tensor | None,
    grad_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    normalize: bool,
    config: shared.Config | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of (q, k, v, g, beta, initial_state); empty for an initial state that was None.

    All sums have a fixed order: the same bits every time.
    """
    if shared.empty(q, v, cu_seqlens):
        return recomputed_gradients(
            lambda *tensors: reference.gated_delta_rule(*tensors, cu_seqlens, scale, normalize),
            (q, k, v, g, beta, initial_state),
            (grad_o, grad_last),
        )
    if grad_o is None:
        grad_o = v.new_zeros(()).expand(v.shape)
    call = shared.call_of(q, k, v, cu_seqlens, config)
    with triton_language.on_device(v):
        lengths = shared.lengths_of(q, k) if normalize else [None, None]
        operands = prepare(q, k, g, beta, call, scale, lengths)
        states, writes, last = shared.states_of(v, operands, call, initial_state, cu_seqlens)
        grad_states, grad_v, grad_start = shared.reverse(grad_o, operands, call, grad_last, torch.empty_like(last))
        pairs = shared.pairs_of(grad_o, writes, grad_v, operands, call)
        if g.dim() == 4:
            given = channels.Given(q, k, g, beta, *lengths, scale, True)
            found = channels.gradients_of(given, operands, grad_o, grad_v, writes, pairs, states, grad_states, call)
            grads, grad_g, grad_beta = found
        else:
            grads = [torch.empty_like(t, dtype=None if lengths[0] is None else torch.float32) for t in (q, k)]
            shares = _keys(grad_o, grad_v, writes, operands, pairs, states, grad_states, grads, call)
            grad_g, grad_beta = _steps(g, beta, lengths[1], pairs[2], shares, operands.own, call)
    return (
        *(shared.of_length_one(t, grad, length) for t, grad, length in zip((q, k), grads, lengths, strict=True)),
        grad_v if grad_v.dtype == v.dtype and v.is_contiguous() else torch.empty_like(v).copy_(grad_v),
        grad_g,
        grad_beta,
        v.new_empty((0,)) if initial_state is None else torch.empty_like(initial_state).copy_(grad_start),
    )


def _keys(
    grad_o: Tensor,
    grad_v: Tensor,
    writes: Tensor,
    operands: shared.Operands,
    pairs: list[Tensor],
    states: Tensor,
    grad_states: Tensor,
    grads: list[Tensor],
    call: shared.Call,
) -> Tensor:
    """Fill the gradients of q and k; shares (3, blocks of columns, chunks, HV, T) of those of the steps."""
    chunks, (length, row, heads), (q, k, _, own, rows, passing, *_) = call.chunks, call.sizes, operands
    blocks = -(-call.K // call.config["BN"])
    shares = rows.new_empty((3, blocks, chunks.count, heads, call.config["T"]))
    bwd._delta_keys_kernel[(chunks.count * heads // own * blocks,)](
        q, k, grad_o, grad_v, writes, rows, passing, *pairs[:2], states, grad_states, chunks.starts, chunks.counts, *grads,
        *shares, length, row, heads, own, call.K, call.V, call.padded, chunks.count,
        *q.stride(), *k.stride(), *grad_o.stride(), *grad_v.stride(), *writes.stride(), *grads[0].stride(), *grads[1].stride(),
        WIDE=wide(grad_o, grad_v, writes), WIDE_K=wide(q, k, *grads), **call.options("BN", "BV"),
    )  # fmt: skip
    return shares


def _steps(
    g: Tensor, beta: Tensor, k_lengths: Tensor | None, by_decay: Tensor, shares: Tensor, own: int, call: shared.Call
) -> tuple[Tensor, Tensor]:
    """Gradients of g and beta."""
    chunks, (length, row, heads) = call.chunks, call.sizes
    grad_g, grad_beta = torch.empty_like(g), torch.empty_like(beta)
    bwd._delta_steps_kernel[(chunks.count * -(-heads // shared.HEADS),)](
        k_lengths, chunks.starts, chunks.counts, by_decay, *shares, grad_g, grad_beta, length, row, heads, own, chunks.count,
        shares.shape[1], *grad_g.stride(), *grad_beta.stride(), BH=shared.HEADS, T=call.config["T"], **shared.SMALL,
    )  # fmt: skip
    return grad_g, grad_beta
