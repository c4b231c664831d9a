"""Linear attention: a recurrence whose states are matrices, one per head, in which keys find values again."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressm.kernels.core import cpp
from compressm.kernels.core.custom_op import custom_op, in_cpp, plain_call, recomputed_gradients, transformed
from compressm.kernels.core.dispatch import chooser, compiled_first
from compressm.kernels.core.dtypes import cast, common_dtype
from compressm.kernels.core.plan import KernelPlan
from compressm.kernels.gated_delta_rule.form import check_named, form_for, too_wide
from compressm.kernels.linear_attention import chunked, reference
from compressm.kernels.linear_attention.arguments import check
from compressm.kernels.linear_attention.form import steps_of
from compressm.kernels.ssd import op as ssd

SMALLEST = 1e-10  # added to what outputs are divided by


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    normalize: bool = False,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T and out_t = scale S_t^T q_t, per head, from S = 0.

    Shapes and meaning are those of flash-linear-attention: without g its ``linear_attn``, with one number a head RetNet's
    retention and Lightning attention, with one a head and step its ``simple_gla``, with one a key channel its ``gla`` (Yang et
    al. 2023, arXiv 2312.06635).  K, V, L, H and HV are arbitrary; cost and memory are linear in L.

    Where all channels of a head decay alike this is :func:`compressm.kernels.ssd` with step sizes that only decay, and runs on
    its kernels.  Decays of channels have kernels of their own.  No form divides by a decay, so that decays may be as strong as
    they like.

    Args:
        q: (batch, L, H, K), float32, bfloat16 or float16 (float64 on the reference); any strides.
        k: like q.
        v: (batch, L, HV, V), HV a multiple of H; its head h goes with the keys and queries of head h // (HV / H).
        g: finite log decays, meant to be no greater than zero: None for no decay, (HV,), (batch, L, HV), or
            (batch, L, HV, K).
        scale: of the queries; None: K^-0.5.
        initial_state: (batch, HV, K, V), the states in front of the first step; None for zero.
        output_final_state: also return the states behind the last step.
        cu_seqlens: (sequences + 1,) int32 or int64: batch is 1 and its steps are several sequences one after the other,
            sequence i at cu_seqlens[i] to cu_seqlens[i + 1], each from a state of its own (states are then
            (sequences, HV, K, V)).
        normalize: divide the outputs by scale z_t q_t + 1e-10, z_t = exp(g_t) z_{t-1} + k_t, which is one more value channel
            whose values are one: the last of states (batch, HV, K, V + 1).
        chunk_size: steps of a chunk, which changes the numbers by rounding alone; None chooses
            (:func:`compressm.kernels.plan`).  Triton's chunks are, for decays of heads, as :func:`compressm.kernels.ssd` says,
            and for those of channels always as planned.
        backend: ``"triton"``, ``"cpp"`` or ``"reference"``; None chooses.

    Returns:
        (out, final states): out (batch, L, HV, V) in v's dtype, the states in float32, or None unless they were asked for.
        States and accumulation are float32 (float64 for float64 inputs).  Every real tensor argument is differentiable.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit, scale or chunk_size make no sense; cu_seqlens does not add up
            (which is looked at on CPU tensors only: on a GPU looking would wait for it).
        BackendError: the named backend cannot run.
    """
    check(q, k, v, g, scale, initial_state, cu_seqlens, normalize, chunk_size)
    values = with_ones(v) if normalize else v
    factor = default_scale(q.shape[3]) if scale is None else float(scale)
    if g is None or g.dim() < 4:
        out, last = _of_heads(q, k, values, g, initial_state, cu_seqlens, factor, chunk_size, backend)
    else:
        out, last = _of_channels(q, k, values, g, initial_state, cu_seqlens, factor, chunk_size, backend)
    return normalized(out) if normalize else out, last.contiguous() if output_final_state else None


def default_scale(keys: int) -> float:
    """K^-0.5"""
    return 1.0 / math.sqrt(max(keys, 1))


def with_ones(v: Tensor) -> Tensor:
    """v (..., V) with one more channel, of ones."""
    return pad(v, (0, 1), value=1.0)


def normalized(out: Tensor) -> Tensor:
    """Outputs (..., V + 1) divided by their last channel."""
    return out[..., :-1] / (out[..., -1:] + SMALLEST)


def _of_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Where all channels of a head decay alike, as Mamba-2's scan."""
    steps, wide = v.shape[:3], torch.promote_types(v.dtype, torch.float32)
    if g is None or g.dim() == 1:
        dt, A = v.new_ones((), dtype=wide).expand(steps), v.new_zeros(steps[2:], dtype=wide) if g is None else g
    else:
        dt, A = g, g.new_ones(steps[2:])
    start = None if initial_state is None else initial_state.mT
    tensors = (v, dt, A, k, q, None, None, None, start)
    out, last = ssd.scan(tensors, None, cu_seqlens, (False, -math.inf, math.inf, False), chunk_size, backend, scale)
    return out, last.mT


def _of_channels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Where every channel of the keys has its decay."""
    check_named("linear_attention", backend, q.shape[3])
    tensors: Any = (q, k, v, g, initial_state)
    chosen = choose_backend(v.device.type, common_dtype(q, k, v, g), backend=backend)
    form = "chunked" if chosen == "reference" and not ssd.stepwise(v.dtype, backend) else chosen
    settings = (scale, 0 if chunk_size is None else chunk_size, form)
    if chosen == "cpp":
        tensors = tuple(cast(t, torch.float32) for t in tensors)
    if chosen == "reference" and (plain_call(*tensors, cu_seqlens) or transformed()):
        out, last = _in_torch(*tensors, cu_seqlens, *settings)
    else:
        out, last = linear_attention_op(*tensors, cu_seqlens, *settings)
    return cast(out, v.dtype), last


# For decays of channels, of (device type, the dtype that the tensors promote to): Triton on a GPU, C++ on a CPU, else the
# reference.
choose_backend = chooser(
    "linear_attention",
    lambda device, dtype: compiled_first(
        device, lambda: _triton_why_not(device, dtype), lambda: cpp.why_not_for(device, dtype)
    ),
)


def _triton_why_not(device: str, dtype: torch.dtype) -> str | None:
    from compressm.kernels.linear_attention import triton_launch

    return triton_launch.why_not(device, dtype)


def plan_for_shapes(
    device: str, dtype: torch.dtype, q: tuple[int, ...], v: tuple[int, ...], channels: bool, backend: str | None
) -> KernelPlan:
    """The plan that :func:`linear_attention` follows for q and v of these shapes; channels: each has its decay."""
    if not channels:
        return replace(ssd.plan_for_shapes(device, dtype, v, q[2], q[3], backend), op="linear_attention")
    check_named("linear_attention", backend, q[3])
    chosen = choose_backend(device, dtype, backend=backend)
    if chosen == "reference" and ssd.stepwise(dtype, backend):
        return KernelPlan("linear_attention", "reference", "scan", (), "one step at a time")
    wide = too_wide(q[3]) if chosen == "triton" else None
    if chosen == "triton" and wide is None:
        from compressm.kernels.linear_attention import triton_launch

        return triton_launch.plan(q[3], v[3], dtype, "linear_attention")
    config = (("chunk", steps_of(chosen, q[3], v[3], q[1])),)
    if chosen == "cpp":
        return KernelPlan("linear_attention", "cpp", "walk", config, "tiles of states in registers, which walk over the steps")
    reason = wide or "products within chunks that are halved again and again"
    return KernelPlan("linear_attention", "reference" if wide else chosen, "chunks", config, reason)


def _in_torch(*arguments) -> tuple[Tensor, Tensor]:
    """The arguments of :func:`linear_attention_op` by the reference or in chunks, differentiable."""
    *given, chunk, form = arguments
    if form == "reference":
        return reference.linear_attention(*given)
    return chunked.linear_attention(*given, _chunk(given[0], given[2], chunk, form))


def _chunk(q: Tensor, v: Tensor, chunk: int, backend: str) -> int:
    """The given length of a chunk, or (0) that of the plan."""
    return chunk or steps_of(backend, q.shape[3], v.shape[3], v.shape[1])


@custom_op("compressm::linear_attention", differentiable=in_cpp)
def linear_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Decays of channels on a backend: ``"cpp"``, which takes float32 alone, ``"triton"``, which is ``"chunked"`` where K is
    too wide for it, ``"reference"``, or ``"chunked"``.

    Args:
        chunk: steps of a chunk; 0: as planned for the sizes.  Triton's chunks are always those of its plan.

    Returns:
        out, contiguous, in v's dtype, and final states, at least float32.
    """
    form = form_for(backend, q.shape[3])
    if form == "cpp":
        return cpp.library().linear_attention(q, k, v, g, initial_state, cu_seqlens, scale, _chunk(q, v, chunk, form))
    if form == "triton":
        from compressm.kernels.linear_attention import triton_launch

        return triton_launch.forward(q, k, v, g, initial_state, cu_seqlens, scale)
    out, last = _in_torch(q, k, v, g, initial_state, cu_seqlens, scale, chunk, form)
    return out.clone(memory_format=torch.contiguous_format), last.clone(memory_format=torch.contiguous_format)


@linear_attention_op.register_fake
def _(q, k, v, g, initial_state, cu_seqlens, scale, chunk, backend):
    sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = (sequences, v.shape[2], k.shape[3], v.shape[3])
    return v.new_empty(v.shape), v.new_empty(states, dtype=torch.promote_types(v.dtype, torch.float32))


@custom_op("compressm::linear_attention_backward")
def linear_attention_backward_op(
    grad_out: Tensor | None,
    grad_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (q, k, v, g, initial_state), contiguous; empty for an initial state that was None."""
    tensors = (q, k, v, g, initial_state)
    form = form_for(backend, q.shape[3])
    if form == "cpp":
        chunk = _chunk(q, v, chunk, form)
        return cpp.library().linear_attention_backward(grad_out, grad_last, *tensors, cu_seqlens, scale, chunk)
    if form == "triton":
        from compressm.kernels.linear_attention import triton_launch

        gradients: Any = triton_launch.backward(grad_out, grad_last, *tensors, cu_seqlens, scale)
        return gradients

    def run(*leaves: Tensor | None) -> tuple[Tensor, Tensor]:
        return _in_torch(*leaves, cu_seqlens, scale, chunk, form)

    gradients = tuple(t.contiguous() for t in recomputed_gradients(run, tensors, (grad_out, grad_last)))
    return gradients


@linear_attention_backward_op.register_fake
def _(grad_out, grad_last, q, k, v, g, initial_state, cu_seqlens, scale, chunk, backend):
    return tuple(q.new_empty((0,)) if t is None else t.new_empty(t.shape) for t in (q, k, v, g, initial_state))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_last):
    saved = ctx.saved_tensors
    grads = linear_attention_backward_op(grad_out, grad_last, *saved, *ctx.settings)
    return (*(None if t is None else grad for t, grad in zip(saved[:5], grads, strict=True)), *[None] * 4)


linear_attention_op.register_autograd(_backward, _setup_context)
