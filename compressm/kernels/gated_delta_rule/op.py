"""The gated delta rule: a recurrence whose states are matrices, one per head; each step replaces what its key holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compressm.kernels.core import cpp
from compressm.kernels.core.custom_op import custom_op, in_cpp, plain_call, recomputed_gradients, transformed
from compressm.kernels.core.dispatch import chooser, compiled_first
from compressm.kernels.core.dtypes import cast, common_dtype
from compressm.kernels.core.plan import KernelPlan
from compressm.kernels.gated_delta_rule import chunked, reference
from compressm.kernels.gated_delta_rule.arguments import check
from compressm.kernels.gated_delta_rule.form import check_named, chunk_length, form_for, too_wide
from compressm.kernels.ssd.op import stepwise


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S = diag(exp g_t) S_{t-1}, S_t = S + beta_t k_t (v_t - S^T k_t)^T and o_t = scale S_t^T q_t, per head, from S = 0.

    The meaning and the argument order are those of flash-linear-attention's ``chunk_gated_delta_rule`` (Yang, Kautz and
    Hatamizadeh 2024, arXiv 2412.06464) and, where g is per channel, of its ``chunk_kda`` (Kimi Team 2025, arXiv 2510.26692).
    K, V, L, H and HV are arbitrary; cost and memory are linear in L.  It is computed in chunks of steps by matrix products
    and the solution of triangular systems; the backward keeps the arguments alone and recomputes the states, one a chunk.

    Args:
        q: (batch, L, H, K), float32, bfloat16 or float16 (float64 on the reference); any strides.
        k: like q.  Keys should be no longer than one, and beta |k|^2 no more than two: states may grow without bound else.
        v: (batch, L, HV, V), HV a multiple of H; its head h goes with the keys and queries of head h // (HV / H).
        g: log decays, none positive: (batch, L, HV), one a head, or (batch, L, HV, K), one a channel of the keys.
        beta: (batch, L, HV), how much of what its key holds a step replaces.
        scale: of the queries; None: K^-0.5.
        initial_state: (batch, HV, K, V), the states in front of the first step; None for zero.
        output_final_state: also return the states behind the last step.
        use_qk_l2norm_in_kernel: q and k are brought to length one first.
        cu_seqlens: (sequences + 1,) int32 or int64: batch is 1 and its steps are several sequences one after the other,
            sequence i at cu_seqlens[i] to cu_seqlens[i + 1], each from a state of its own (states are then
            (sequences, HV, K, V)).
        chunk_size: steps of a chunk, which changes the numbers by rounding alone; None chooses by K and V
            (:func:`compressm.kernels.plan`), as Triton always does.
        backend: ``"triton"``, ``"cpp"`` or ``"reference"``; None chooses.

    Returns:
        (o, final states): o (batch, L, HV, V) in v's dtype, the states (batch, HV, K, V) in float32, or None unless they were
        asked for.  States and accumulation are float32 (float64 for float64 inputs).  Every real tensor argument is
        differentiable.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit, scale or chunk_size make no sense; cu_seqlens does not add up
            (which is looked at on CPU tensors only: on a GPU looking would wait for it).
        BackendError: the named backend cannot run.
    """
    check(q, k, v, g, beta, initial_state, cu_seqlens, scale, chunk_size)
    check_named("gated_delta_rule", backend, q.shape[3])
    tensors: Any = (q, k, v, g, beta, initial_state)
    chosen = choose_backend(v.device.type, common_dtype(q, k, v, g, beta), backend=backend)
    form = "chunked" if chosen == "reference" and not stepwise(v.dtype, backend) else chosen
    settings = (None if scale is None else float(scale), use_qk_l2norm_in_kernel, 0 if chunk_size is None else chunk_size, form)
    if chosen == "cpp":
        tensors = tuple(cast(t, torch.float32) for t in tensors)
    if chosen == "reference" and (plain_call(*tensors, cu_seqlens) or transformed()):
        o, last = _in_torch(*tensors, cu_seqlens, *settings)
    else:
        o, last = gated_delta_rule_op(*tensors, cu_seqlens, *settings)
    return cast(o, v.dtype), last if output_final_state else None


# Of (device type, the dtype that the tensors promote to): Triton on a GPU, C++ on a CPU, else the reference.
choose_backend = chooser(
    "gated_delta_rule",
    lambda device, dtype: compiled_first(
        device, lambda: _triton_why_not(device, dtype), lambda: cpp.why_not_for(device, dtype)
    ),
)


def _triton_why_not(device: str, dtype: torch.dtype) -> str | None:
    from compressm.kernels.gated_delta_rule import triton_launch

    return triton_launch.why_not(device, dtype)


def plan_for_shapes(device: str, dtype: torch.dtype, keys: int, length: int, values: int, backend: str | None) -> KernelPlan:
    """The plan that :func:`gated_delta_rule` follows.

    Args:
        device: device type; dtype: of the inputs.
        keys: K; length: L; values: V.
        backend: as the function takes it.
    """
    check_named("gated_delta_rule", backend, keys)
    chosen = choose_backend(device, dtype, backend=backend)
    wide = too_wide(keys) if chosen == "triton" else None
    if chosen == "triton" and wide is None:
        from compressm.kernels.gated_delta_rule import triton_launch

        return triton_launch.plan(keys, values, dtype)
    if chosen == "reference" and stepwise(dtype, backend):
        return KernelPlan("gated_delta_rule", "reference", "scan", (), "one step at a time")
    chunk = chunk_length(keys, values, length)
    reason = wide or "products and a triangular system within chunks, between which states pass"
    return KernelPlan("gated_delta_rule", "reference" if wide else chosen, "chunks", (("chunk", chunk),), reason)


def _chunk(q: Tensor, v: Tensor, chunk: int) -> int:
    """The given length of a chunk, or (0) that of the plan."""
    return chunk or chunk_length(q.shape[3], v.shape[3], v.shape[1])


def _in_torch(*arguments) -> tuple[Tensor, Tensor]:
    """The arguments of :func:`gated_delta_rule_op` by the reference or in chunks, differentiable."""
    *given, chunk, form = arguments
    if form == "reference":
        return reference.gated_delta_rule(*given)
    return chunked.gated_delta_rule(*given, _chunk(given[0], given[2], chunk))


@custom_op("compressm::gated_delta_rule", differentiable=in_cpp)
def gated_delta_rule_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    normalize: bool,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """gated_delta_rule on a backend: ``"cpp"``, which takes float32 alone, ``"triton"``, which is ``"chunked"`` where K is too
    wide for it, ``"reference"``, or ``"chunked"``.

    Args:
        normalize: q and k are brought to length one.
        chunk: steps of a chunk; 0: as planned for the sizes.  Triton's chunks are always those of its plan.

    Returns:
        o, contiguous, in v's dtype, and final states, at least float32.
    """
    form = form_for(backend, q.shape[3])
    if form == "cpp":
        return cpp.library().gated_delta_rule(
            q, k, v, g, beta, initial_state, cu_seqlens, reference.factor(k, scale), normalize, _chunk(q, v, chunk)
        )
    if form == "triton":
        from compressm.kernels.gated_delta_rule import triton_launch

        return triton_launch.forward(q, k, v, g, beta, initial_state, cu_seqlens, reference.factor(k, scale), normalize)
    o, last = _in_torch(q, k, v, g, beta, initial_state, cu_seqlens, scale, normalize, chunk, form)
    return o.clone(memory_format=torch.contiguous_format), last.clone(memory_format=torch.contiguous_format)


@gated_delta_rule_op.register_fake
def _(q, k, v, g, beta, initial_state, cu_seqlens, scale, normalize, chunk, backend):
    sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = (sequences, v.shape[2], k.shape[3], v.shape[3])
    return v.new_empty(v.shape), v.new_empty(states, dtype=torch.promote_types(v.dtype, torch.float32))


@custom_op("compressm::gated_delta_rule_backward")
def gated_delta_rule_backward_op(
    grad_o: Tensor | None,
    grad_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    normalize: bool,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (q, k, v, g, beta, initial_state); empty for an initial state that was None."""
    tensors = (q, k, v, g, beta, initial_state)
    form = form_for(backend, q.shape[3])
    if form == "cpp":
        return cpp.library().gated_delta_rule_backward(
            grad_o, grad_last, *tensors, cu_seqlens, reference.factor(k, scale), normalize, _chunk(q, v, chunk)
        )
    if form == "triton":
        from compressm.kernels.gated_delta_rule import triton_launch

        gradients: Any = triton_launch.backward(
            grad_o, grad_last, *tensors, cu_seqlens, reference.factor(k, scale), normalize
        )
        return gradients

    def run(*leaves: Tensor | None) -> tuple[Tensor, Tensor]:
        return _in_torch(*leaves, cu_seqlens, scale, normalize, chunk, form)

    return recomputed_gradients(run, tensors, (grad_o, grad_last))


@gated_delta_rule_backward_op.register_fake
def _(grad_o, grad_last, q, k, v, g, beta, initial_state, cu_seqlens, scale, normalize, chunk, backend):
    arguments = (q, k, v, g, beta, initial_state)
    return tuple(q.new_empty((0,)) if t is None else torch.empty_like(t) for t in arguments)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    ctx.settings = inputs[7:]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_o, grad_last):
    saved = ctx.saved_tensors
    grads = gated_delta_rule_backward_op(grad_o, grad_last, *saved, *ctx.settings)
    return (*(None if t is None else grad for t, grad in zip(saved[:6], grads, strict=True)), *[None] * 5)


gated_delta_rule_op.register_autograd(_backward, _setup_context)
