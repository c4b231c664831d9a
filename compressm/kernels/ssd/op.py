"""The scan of Mamba-2: a recurrence whose states are matrices, one per head, that decay by one number per head and step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from compressm.kernels.core import cpp
from compressm.kernels.core.custom_op import custom_op, in_cpp, plain_call, recomputed_gradients, transformed
from compressm.kernels.core.dispatch import chooser, compiled_first
from compressm.kernels.core.dtypes import cast, common_dtype
from compressm.kernels.core.plan import KernelPlan
from compressm.kernels.ssd import chunked, reference
from compressm.kernels.ssd.arguments import check
from compressm.kernels.ssd.form import chunk_length


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """S_t = exp(step_t A) S_{t-1} + step_t x_t B_t^T and out_t = (S_t C_t + D x_t) silu(z_t), per head, from S = 0.

    The meaning and the argument order are those of mamba_ssm's ``mamba_chunk_scan_combined`` (Dao and Gu 2024, arXiv
    2405.21060), with step = dt + dt_bias, or softplus of it, clamped to dt_limit.  N, P, L, H and G are arbitrary; cost and
    memory are linear in N and L.  It is computed in chunks of steps by matrix products; the backward keeps the arguments
    alone and recomputes the states, one a chunk.

    Args:
        x: (batch, L, H, P), float32, bfloat16 or float16 (float64 on the reference); any strides.
        dt: (batch, L, H), step sizes before bias, softplus and limits.
        A: (H,) real, not positive.
        B: (batch, L, G, N), what a step writes along; head h reads group h // (H / G).
        C: like B, what it reads along.
        chunk_size: steps of a chunk, which changes the numbers by rounding alone; None chooses by N and L
            (:func:`compressm.kernels.plan`).  Triton's chunks have 16, 32 or 64 steps: as many of these as are no more than
            that, or 16.
        D: (H,) or (H, P) skip weights, or None.
        z: (batch, L, H, P) gate, or None.
        dt_bias: (H,), or None.
        initial_states: (batch, H, P, N), the states in front of the first step; None for zero.
        seq_idx: (batch, L) int32 or int64 that never decrease along a row, the number of the sequence that each step belongs
            to: where it changes, the states begin anew from zero.  initial_states are in front of the first sequence of a
            row, final states behind its last.
        cu_seqlens: (sequences + 1,) int32 or int64: batch is 1 and its steps are several sequences one after the other,
            sequence i at cu_seqlens[i] to cu_seqlens[i + 1], each from states of its own (states are then
            (sequences, H, P, N)).
        dt_softplus: step = softplus(dt + dt_bias).
        dt_limit: the least and the largest step.
        return_final_states: also return the states behind the last step.
        backend: ``"triton"``, ``"cpp"`` or ``"reference"``; None chooses.

    Returns:
        out (batch, L, H, P) in x's dtype, or (out, final states (batch, H, P, N) in float32).  States and accumulation are
        float32 (float64 for float64 inputs).  Every real tensor argument is differentiable.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit, seq_idx meets cu_seqlens, chunk_size or dt_limit make no sense;
            A is positive or not finite, seq_idx decreases, cu_seqlens does not add up (these three are looked at on CPU
            tensors only: on a GPU looking would wait for it).
        BackendError: the named backend cannot run.
    """
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    low, high = check(*tensors, seq_idx, cu_seqlens, chunk_size, dt_limit)
    out, last = scan(tensors, seq_idx, cu_seqlens, (dt_softplus, low, high, True), chunk_size, backend)
    return (out, last) if return_final_states else out


def scan(
    tensors: Any,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    of_steps: tuple[bool, float, float, bool],
    chunk_size: int | None,
    backend: str | None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(out, final states) on the backend that is chosen; the arguments are those of :func:`ssd`, and not looked at.

    Args:
        tensors: x, dt, A, B, C, D, z, dt_bias, initial_states.
        of_steps: dt_softplus, low, high and scaled, as :func:`ssd_op` has them.
        scale: of C.
    """
    x, dt, _, B, C, _, z, *_ = tensors
    chosen = choose_backend(x.device.type, common_dtype(x, dt, B, C, z), backend=backend)
    form = "chunked" if chosen == "reference" and not stepwise(x.dtype, backend) else chosen
    settings = (*of_steps, scale if chosen == "triton" else 1.0, 0 if chunk_size is None else chunk_size, form)
    if chosen == "cpp":
        tensors = tuple(cast(t, torch.float32) for t in tensors)
    if chosen != "triton" and scale != 1.0:
        tensors = (*tensors[:4], tensors[4] * scale, *tensors[5:])
    if chosen == "reference" and (plain_call(*tensors, seq_idx, cu_seqlens) or transformed()):
        out, last = _in_torch(*tensors, seq_idx, cu_seqlens, *settings)
    else:
        out, last = ssd_op(*tensors, seq_idx, cu_seqlens, *settings)
    return cast(out, x.dtype), last


# Of (device type, the dtype that the tensors promote to): Triton on a GPU, C++ on a CPU, else the reference.
choose_backend = chooser(
    "ssd",
    lambda device, dtype: compiled_first(
        device, lambda: _triton_why_not(device, dtype), lambda: cpp.why_not_for(device, dtype)
    ),
)


def _triton_why_not(device: str, dtype: torch.dtype) -> str | None:
    from compressm.kernels.ssd import triton_launch

    return triton_launch.why_not(device, dtype)


def stepwise(dtype: torch.dtype, backend: str | None) -> bool:
    """Whether the reference walks step by step, as the oracle does: where it was asked for by name, and in float64."""
    return backend == "reference" or dtype == torch.float64


def plan_for_shapes(
    device: str, dtype: torch.dtype, shape: Any, groups: int, states: int, backend: str | None
) -> KernelPlan:
    """The plan that :func:`ssd` follows for x of ``shape``, and B and C of ``groups`` x ``states``."""
    chosen = choose_backend(device, dtype, backend=backend)
    if chosen == "triton":
        from compressm.kernels.ssd import triton_launch

        return triton_launch.plan(*shape, groups, states, dtype)
    _, length, _, channels = shape
    if chosen == "reference" and stepwise(dtype, backend):
        return KernelPlan("ssd", "reference", "scan", (), "one step at a time")
    chunk = chunk_length(states, channels, length)
    reason = "products within chunks, which shrink with the states that pass between them"
    return KernelPlan("ssd", chosen, "chunks", (("chunk", chunk),), reason)


def _in_torch(*arguments) -> tuple[Tensor, Tensor]:
    """The arguments of :func:`ssd_op` by the reference or in chunks, differentiable."""
    *given, _scale, chunk, form = arguments
    if form == "reference":
        return reference.ssd(*given)
    return chunked.ssd(*given, _chunk(given[0], given[3], chunk))


def _chunk(x: Tensor, B: Tensor, chunk: int) -> int:
    """The given length of a chunk, as far as there are steps, or (0) that of the plan."""
    return min(chunk, max(x.shape[1], 1)) if chunk else chunk_length(B.shape[3], x.shape[3], x.shape[1])


@custom_op("compressm::ssd", differentiable=in_cpp)
def ssd_op(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
    scaled: bool,
    scale: float,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """ssd on a backend: ``"cpp"``, which takes float32 alone, ``"triton"``, ``"reference"``, or ``"chunked"``, torch's own.

    Args:
        scaled: the step sizes scale what is written, as in Mamba-2; else they only decay, and step A is a log decay.
        scale: of C, where Triton's kernels read it; one for all other backends.
        chunk: steps of a chunk; 0: as planned for the sizes.

    Returns:
        out, contiguous, in x's dtype, and final states, at least float32.
    """
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens)
    if backend == "cpp":
        return cpp.library().ssd(*tensors, dt_softplus, low, high, scaled, _chunk(x, B, chunk))
    if backend == "triton":
        from compressm.kernels.ssd import triton_launch

        return triton_launch.forward(*tensors, dt_softplus, low, high, scaled, scale, chunk)
    out, last = _in_torch(*tensors, dt_softplus, low, high, scaled, scale, chunk, backend)
    return out.clone(memory_format=torch.contiguous_format), last.clone(memory_format=torch.contiguous_format)


@ssd_op.register_fake
def _(
    x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, low, high, scaled, scale, chunk, backend
):  # fmt: skip
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = (sequences, x.shape[2], x.shape[3], B.shape[3])
    return x.new_empty(x.shape), x.new_empty(states, dtype=torch.promote_types(x.dtype, torch.float32))


@custom_op("compressm::ssd_backward")
def ssd_backward_op(
    grad_out: Tensor | None,
    grad_last: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
    scaled: bool,
    scale: float,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, dt, A, B, C, D, z, dt_bias, initial_states); empty for an argument that was None."""
    tensors, packing = (x, dt, A, B, C, D, z, dt_bias, initial_states), (seq_idx, cu_seqlens)
    if backend == "cpp":
        chunk = _chunk(x, B, chunk)
        return cpp.library().ssd_backward(grad_out, grad_last, *tensors, *packing, dt_softplus, low, high, scaled, chunk)
    if backend == "triton":
        from compressm.kernels.ssd import triton_launch

        gradients: Any = triton_launch.backward(
            grad_out, grad_last, *tensors, *packing, dt_softplus, low, high, scaled, scale, chunk
        )
        return gradients

    def run(*leaves: Tensor | None) -> tuple[Tensor, Tensor]:
        return _in_torch(*leaves, *packing, dt_softplus, low, high, scaled, scale, chunk, backend)

    return recomputed_gradients(run, tensors, (grad_out, grad_last))


@ssd_backward_op.register_fake
def _(
    grad_out, grad_last, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, low, high, scaled,
    scale, chunk, backend,
):  # fmt: skip
    arguments = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    return tuple(x.new_empty((0,)) if t is None else torch.empty_like(t) for t in arguments)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:11])
    ctx.settings = inputs[11:]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_last):
    saved = ctx.saved_tensors
    grads = ssd_backward_op(grad_out, grad_last, *saved, *ctx.settings)
    return (*(None if t is None else grad for t, grad in zip(saved[:9], grads, strict=True)), *[None] * 9)


ssd_op.register_autograd(_backward, _setup_context)
