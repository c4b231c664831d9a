"""The selective scan of Mamba-1: a diagonal recurrence whose step sizes, inputs and outputs depend on the token."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels.core.custom_op import custom_op, in_cpp, plain_call, recomputed_gradients, transformed
from compressm.kernels.core.dispatch import chooser, compiled_first
from compressm.kernels.core.dtypes import cast, common_dtype
from compressm.kernels.core.plan import KernelPlan
from compressm.kernels.selective_scan import cpu, reference


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t and out_t = (C_t h_t + D u_t) silu(z_t), per channel, from h = 0.

    The meaning and the argument order are those of mamba_ssm's ``selective_scan_fn`` (Gu and Dao 2023, arXiv 2312.00752,
    equation 2 and algorithm 2), with dt = delta + delta_bias, or softplus of it.  N, L, D and G are arbitrary; cost and
    memory are linear in N.  The backward recomputes the states from a few that the forward keeps.

    Args:
        u: (batch, D, L), float32, bfloat16 or float16 (float64 on the reference); any strides, so that a transposed
            (batch, L, D) tensor is read without a copy.
        delta: (batch, D, L), step sizes before bias and softplus.
        A: (D, N) real, not positive.
        B: (batch, G, N, L), (batch, N, L) for one group, or (D, N) where it is constant; channel d reads group d // (D / G).
        C: like B.
        D: (D,) skip weights, or None.
        z: (batch, D, L) gate, or None.
        delta_bias: (D,), or None.
        delta_softplus: dt = softplus(delta + delta_bias).
        return_last_state: also return the state after the last step.
        initial_state: (batch, D, N), the state in front of the first step; None for zero.
        cu_seqlens: (sequences + 1,) int32 or int64: batch is 1 and its steps are several sequences one after the other,
            sequence i at cu_seqlens[i] to cu_seqlens[i + 1], each from a state of its own (states are then
            (sequences, D, N)).
        backend: ``"triton"``, ``"cpp"`` or ``"reference"``; None chooses.

    Returns:
        out (batch, D, L) in u's dtype and strides, or (out, last state (batch, D, N) in float32).  State and accumulation
        are float32 (float64 for float64 inputs).  Every tensor argument but cu_seqlens is differentiable.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit; A is positive or not finite, cu_seqlens does not add up (these
            two are looked at on CPU tensors only: on a GPU looking would wait for it).
        BackendError: the named backend cannot run.
    """
    B, C = (t.unsqueeze(1) if t.dim() == 3 else t for t in (B, C))
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    constant = B.dim() == 2 or C.dim() == 2
    io = common_dtype(u, delta, B, C, z)
    chosen = choose_backend(u.device.type, io, constant, backend=backend)
    arguments: Any = (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    if chosen == "reference" and (plain_call(*arguments) or transformed()):
        out, last = reference.selective_scan(*arguments, delta_softplus)
    elif chosen == "reference":
        out, last, *_ = selective_scan_op(*arguments, delta_softplus, False, chosen)
    else:
        if chosen == "cpp":
            io, mixing = cpu.dtype_of_rows(u, delta, z), torch.float32
        else:
            mixing = io
        u_io, delta, z, B, C = *(cast(t, io) for t in (u, delta, z)), *(cast(t, mixing) for t in (B, C))
        A, D, delta_bias, initial_state = (cast(t, torch.float32) for t in (A, D, delta_bias, initial_state))
        out, last, *_ = selective_scan_op(
            u_io, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus,
            torch.is_grad_enabled() or torch.jit.is_tracing(), chosen,
        )  # fmt: skip
        out = cast(out, u.dtype)
    return (out, last) if return_last_state else out


# Of (device type, the dtype that the tensors promote to, whether B or C has no time axis): Triton on a GPU, C++ on a CPU, else
# the reference.
choose_backend = chooser(
    "selective_scan",
    lambda device, dtype, constant: compiled_first(
        device,
        lambda: _triton_why_not(device, dtype, constant),
        lambda: cpu.why_not(device, dtype, constant),
    ),
)


def _triton_why_not(device: str, dtype: torch.dtype, constant: bool) -> str | None:
    from compressm.kernels.selective_scan import triton_launch

    return triton_launch.why_not(device, dtype, constant)


def plan_for_shapes(
    device: str,
    dtype: torch.dtype,
    batch: int,
    channels: int,
    length: int,
    states: int,
    constant: bool,
    backend: str | None,
) -> KernelPlan:
    """The plan that :func:`selective_scan` follows for an input (batch, channels, length)."""
    chosen = choose_backend(device, dtype, constant, backend=backend)
    if chosen == "reference" or math.prod((batch, channels, length, states)) == 0:
        return KernelPlan("selective_scan", "reference", "scan", (), "one step at a time")
    if chosen == "cpp":
        return cpu.plan(batch, channels, length, states)
    from compressm.kernels.selective_scan import triton_launch

    return triton_launch.plan(batch, channels, length, states, dtype)


@custom_op("compressm::selective_scan", differentiable=in_cpp)
def selective_scan_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    train: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """selective_scan on a backend.

    On the compiled ones u, delta and z share one dtype; so do B (batch, G, N, L) and C: the same, or with ``"cpp"`` always
    float32.  A, D, delta_bias and initial_state are float32.  ``"reference"`` takes them as they come.

    Returns:
        out (as u), last state (sequences, D, N) float32, and, where ``train``, what the backward needs: checkpoints (states
        in front of every tile of steps, float32) and the scan's output in front of the gate (as u; empty without z).  The
        reference keeps nothing.
    """
    if backend == "reference":
        out, last = reference.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus
        )
        out = out.clone(memory_format=torch.contiguous_format)
        return out, last.clone(), A.new_empty((0,)), u.new_empty((0,))
    return _backend(backend).forward(
        u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, train
    )


def _backend(name: str):
    if name == "cpp":
        return cpu
    from compressm.kernels.selective_scan import triton_launch

    return triton_launch


@selective_scan_op.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, train, backend):
    batch, channels, length = u.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if backend == "reference":
        last = A.new_empty((sequences, *A.shape), dtype=torch.promote_types(u.dtype, torch.float32))
        return torch.empty_like(u, memory_format=torch.contiguous_format), last, A.new_empty((0,)), u.new_empty((0,))
    shape = _backend(backend).checkpoint_shape(batch, channels, length, A.shape[1], cu_seqlens is not None, sequences)
    return (
        torch.empty_like(u),
        A.new_empty((sequences, channels, A.shape[1])),
        A.new_empty(shape if train else (0,)),
        torch.empty_like(u) if train and z is not None else u.new_empty((0,)),
    )


@custom_op("compressm::selective_scan_backward")
def selective_scan_backward_op(
    grad_out: Tensor,
    grad_last: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    y: Tensor,
    delta_softplus: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (u, delta, A, B, C, D, z, delta_bias, initial_state); empty for an argument that was None."""
    if backend == "reference":
        return recomputed_gradients(
            lambda *tensors: reference.selective_scan(*tensors, cu_seqlens, delta_softplus),
            (u, delta, A, B, C, D, z, delta_bias, initial_state),
            (grad_out, grad_last),
        )
    return _backend(backend).backward(
        grad_out, grad_last, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, checkpoints, y, delta_softplus
    )


@selective_scan_backward_op.register_fake
def _(
    grad_out, grad_last, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, checkpoints, y, delta_softplus, backend
):  # fmt: skip
    arguments = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return tuple(u.new_empty((0,)) if t is None else torch.empty_like(t) for t in arguments)


def _setup_context(ctx, inputs, output):
    *tensors, delta_softplus, _, backend = inputs
    ctx.save_for_backward(*tensors, output[2], output[3])
    ctx.settings = (delta_softplus, backend)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_last, _grad_checkpoints, _grad_y):
    saved = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(saved[0])
    grads = selective_scan_backward_op(grad_out, grad_last, *saved, *ctx.settings)
    grads = [None if t is None else grad for t, grad in zip(saved[:9], grads, strict=True)]
    return (*grads, None, None, None, None)


selective_scan_op.register_autograd(_backward, _setup_context)


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    if u.dim() != 3 or not u.is_floating_point():
        raise bad_argument("u", got=f"{tuple(u.shape)} of {u.dtype}", expected="a real tensor (batch, D, L)")
    batch, channels, length = u.shape
    if A.dim() != 2 or A.shape[0] != channels or not A.is_floating_point():
        expected = f"a real tensor (D, N) with D = {channels} as in u"
        raise bad_argument("A", got=f"{tuple(A.shape)} of {A.dtype}", expected=expected)
    states = A.shape[1]
    groups: int | None = None
    for name, mixing in (("B", B), ("C", C)):
        if mixing.dim() == 4 and groups is None:
            groups = mixing.shape[1]
            if groups == 0 or channels % groups:
                raise bad_argument(name, got=f"{groups} groups", expected=f"a number of groups that divides D = {channels}")
        if mixing.shape != ((batch, groups, states, length) if mixing.dim() == 4 else (channels, states)):
            expected = f"(batch, N, L), (batch, G, N, L) or (D, N) with batch {batch}, D {channels}, N {states}, L {length}"
            if groups is not None:
                expected += f", G {groups}"
            raise bad_argument(name, got=f"shape {tuple(mixing.shape)}", expected=expected)
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    wanted: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...] = (
        ("delta", delta, (batch, channels, length)),
        ("D", D, (channels,)),
        ("z", z, (batch, channels, length)),
        ("delta_bias", delta_bias, (channels,)),
        ("initial_state", initial_state, (sequences, channels, states)),
    )
    for name, tensor, shape in wanted:
        if tensor is not None and tensor.shape != shape:
            raise bad_argument(name, got=f"shape {tuple(tensor.shape)}", expected=f"shape {shape}")
    device = u.device
    for name, tensor in (
        ("delta", delta), ("D", D), ("z", z), ("delta_bias", delta_bias), ("initial_state", initial_state),
        ("A", A), ("B", B), ("C", C),
    ):  # fmt: skip
        if tensor is not None and not tensor.is_floating_point():
            raise bad_argument(name, got=str(tensor.dtype), expected="a real floating point tensor")
        if tensor is not None and tensor.device != device:
            raise bad_argument(name, got=f"device {tensor.device}", expected=f"{device}, where u is")
    if cu_seqlens is not None:
        _check_packing(cu_seqlens, batch, device)
    if device.type == "cpu" and plain_call(A, cu_seqlens):  # else there may be no values to look at
        _check_values(A, cu_seqlens, length)


def _check_packing(cu_seqlens: Tensor, batch: int, device: torch.device) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = f"{tuple(cu_seqlens.shape)} of {cu_seqlens.dtype}"
        raise bad_argument("cu_seqlens", got=got, expected="int32 or int64 (sequences + 1,), from 0 to L")
    if batch != 1:
        raise bad_argument("u", got=f"a batch of {batch}", expected="a batch of 1, as cu_seqlens packs the sequences along L")
    if cu_seqlens.device != device:
        raise bad_argument("cu_seqlens", got=f"device {cu_seqlens.device}", expected=f"{device}, where u is")


def _check_values(A: Tensor, cu_seqlens: Tensor | None, length: int) -> None:
    if A.numel():
        low, high = (bound.item() for bound in torch.aminmax(A.detach()))
        if not (math.isfinite(low) and high <= 0):
            got = "NaN or infinite values" if not math.isfinite(low + high) else f"values up to {high:.3g}"
            raise bad_argument("A", got=got, expected="finite values, none positive", remedy="A = -exp(A_log) is negative.")
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in itertools.pairwise(bounds)):
            raise bad_argument("cu_seqlens", got=bounds, expected=f"numbers that rise from 0 to L = {length}")
