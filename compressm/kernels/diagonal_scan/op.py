"""The planar complex diagonal scan as one op: every state of h_t = lam h_{t-1} + x_t."""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels.core import cpp
from compressm.kernels.core.custom_op import custom_op
from compressm.kernels.core.dispatch import Candidate, chooser, compiled_first
from compressm.kernels.diagonal_scan import reference


def diagonal_scan(
    x: Tensor,
    log_decay: Tensor,
    phase: Tensor,
    *,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """All states of the recurrence h_t = lam h_{t-1} + x_t, lam = exp(log_decay + i phase), planar complex numbers.

    Args:
        x: (batch, L, 2N) real, [re | im] along the last axis; float64, float32, bfloat16 or float16.
        log_decay: (N,) real, log of the modulus of the eigenvalues.
        phase: (N,) real, their argument in radians.
        initial_state: (batch, 2N), the state in front of the first step; None for zero.
        reverse: walk time backwards, h_t = lam h_{t+1} + x_t.
        backend: ``"triton"``, ``"cpp"`` or ``"reference"``; None chooses.

    Returns:
        (batch, L, 2N) in x's dtype; half precision accumulates in float32.  Differentiable in x, log_decay, phase and
        initial_state.

    Raises:
        ArgumentError: wrong shapes or dtypes.
        BackendError: the named backend cannot run.
    """
    if x.dim() != 3 or x.shape[-1] != 2 * log_decay.shape[-1] or not x.is_floating_point():
        raise bad_argument(
            "x",
            got=f"{tuple(x.shape)} of {x.dtype}",
            expected=f"a real tensor (batch, length, 2N) with N = {log_decay.shape[-1]}, [re | im]",
        )
    for name, tensor in (("log_decay", log_decay), ("phase", phase)):
        if tensor.dim() != 1 or tensor.shape != log_decay.shape or tensor.device != x.device:
            expected = f"shape {(x.shape[2] // 2,)} on {x.device}"
            raise bad_argument(name, got=f"shape {tuple(tensor.shape)} on {tensor.device}", expected=expected)
    if initial_state is not None and initial_state.shape != (x.shape[0], x.shape[2]):
        raise bad_argument("initial_state", got=tuple(initial_state.shape), expected=f"{(x.shape[0], x.shape[2])}")
    chosen = choose_backend(x.device.type, x.dtype, backend=backend)
    if chosen == "reference":
        return reference.diagonal_scan(x, log_decay, phase, initial_state, reverse)
    if chosen == "cpp":
        return scan_op(x.float().contiguous(), log_decay, phase, initial_state, reverse, chosen).to(x.dtype)
    return scan_op(x, log_decay, phase, initial_state, reverse, chosen)


def _triton_why_not(device: str, dtype: torch.dtype) -> str | None:
    from compressm.kernels.diagonal_scan import triton_scan

    return triton_scan.why_not(device, dtype)


def candidates(device: str, dtype: torch.dtype) -> tuple[Candidate, ...]:
    """Triton on a GPU, C++ on a CPU, else the reference; Triton is imported only for GPU tensors or when asked for."""
    return compiled_first(device, lambda: _triton_why_not(device, dtype), lambda: cpp.why_not_for(device, dtype))


choose_backend = chooser("diagonal_scan", candidates)


@custom_op("compressm::diagonal_scan")
def scan_op(
    x: Tensor, log_decay: Tensor, phase: Tensor, initial_state: Tensor | None, reverse: bool, backend: str
) -> Tensor:
    """diagonal_scan on a compiled backend, ``"cpp"`` or ``"triton"``."""
    if backend == "cpp":
        return cpp.library().diagonal_scan(x, log_decay, phase, initial_state, reverse)
    from compressm.kernels.diagonal_scan import triton_scan

    return triton_scan.diagonal_scan_forward(x, log_decay, phase, initial_state, reverse)


@scan_op.register_fake
def _(x, log_decay, phase, initial_state, reverse, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@custom_op("compressm::diagonal_scan_backward")
def scan_backward_op(
    grad_h: Tensor,
    h: Tensor,
    log_decay: Tensor,
    phase: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, log_decay, phase, initial_state); the last is there even if no initial state was given."""
    if backend == "cpp":
        return cpp.library().diagonal_scan_backward(grad_h, h, log_decay, phase, initial_state, reverse)
    from compressm.kernels.diagonal_scan import triton_scan

    start = initial_state if initial_state is not None else h.new_zeros((h.shape[0], h.shape[2]), dtype=torch.float32)
    return triton_scan.diagonal_scan_backward(grad_h, h, log_decay, phase, start, reverse)


@scan_backward_op.register_fake
def _(grad_h, h, log_decay, phase, initial_state, reverse, backend):
    return (
        torch.empty_like(h),
        torch.empty_like(log_decay),
        torch.empty_like(phase),
        h.new_empty((h.shape[0], h.shape[2]), dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output):
    _, log_decay, phase, initial_state, reverse, backend = inputs
    ctx.save_for_backward(output, log_decay, phase, initial_state)
    ctx.settings = (reverse, backend)


def _backward(ctx, grad_h):
    h, log_decay, phase, initial_state = ctx.saved_tensors
    grad_x, grad_decay, grad_phase, grad_state = scan_backward_op(
        grad_h.contiguous(), h, log_decay, phase, initial_state, *ctx.settings
    )
    grad_state = None if initial_state is None else grad_state.to(initial_state.dtype)
    return grad_x, grad_decay, grad_phase, grad_state, None, None


scan_op.register_autograd(_backward, _setup_context)
