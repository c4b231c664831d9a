"""The C++ backend of the LTI scan as torch custom ops (``csrc/lti_scan.cpp``, ``csrc/lti_tables.cpp``)."""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.kernels import _cpp
from compressm.kernels._custom_op import custom_op
from compressm.kernels._lti_scan_block import BlockTables


@custom_op("compressm::lti_core", differentiable=True)
def lti_core(
    u: Tensor,
    log_decay: Tensor,
    phase: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    feed: Tensor | None,
    initial_state: Tensor | None,
    shifted: bool,
    store: bool,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y_t = W_out h_t + F u_t, fp32, contiguous; shifted: the output sees h_{t-1}.

    Args:
        u: (batch, L, H); log_decay, phase: (N,); w_in: (2N, H); w_out: (H_out, 2N).
        feed: (H,) diagonal or (H_out, H) dense feedthrough, or None; initial_state: (batch, 2N) or None.
        store: keep every state for the backward (else one per tile, the rest recomputed); rows: (sequence, time) rows a tile.

    Returns:
        y (batch, L, H_out), last state (batch, 2N), and what the backward needs (not differentiable).
    """
    return _cpp.library().lti_core(u, log_decay, phase, w_in, w_out, feed, initial_state, shifted, store, rows)


def _saved_states(batch: int, length: int, store: bool, rows: int) -> int:
    return length if store or batch * length == 0 else -(-length // min(rows, length))


@lti_core.register_fake
def _(u, log_decay, phase, w_in, w_out, feed, initial_state, shifted, store, rows):
    batch, length, _ = u.shape
    saved = 0 if batch * length == 0 else _saved_states(batch, length, store, rows)
    n2 = w_in.shape[0]
    return u.new_empty((batch, length, w_out.shape[0])), u.new_empty((batch, n2)), u.new_empty((batch, saved, n2))


@custom_op("compressm::lti_core_backward")
def lti_core_backward(
    grad_y: Tensor,
    grad_last: Tensor | None,
    u: Tensor,
    log_decay: Tensor,
    phase: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    feed: Tensor | None,
    initial_state: Tensor | None,
    saved: Tensor,
    shifted: bool,
    stored: bool,
    rows: int,
    need_u: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (u, log_decay, phase, w_in, w_out, feed, initial_state)."""
    return _cpp.library().lti_core_backward(
        grad_y, grad_last, u, log_decay, phase, w_in, w_out, feed, initial_state, saved, shifted, stored, rows, need_u
    )


@lti_core_backward.register_fake
def _(grad_y, grad_last, u, log_decay, phase, w_in, w_out, feed, initial_state, saved, shifted, stored, rows, need_u):
    return (
        torch.empty_like(u) if need_u else u.new_empty((0,)),
        torch.empty_like(log_decay),
        torch.empty_like(phase),
        torch.empty_like(w_in),
        torch.empty_like(w_out),
        torch.empty_like(feed) if feed is not None else u.new_empty((0,)),
        u.new_empty((u.shape[0], w_in.shape[0])),
    )


def _setup_context(ctx, inputs, output):
    u, log_decay, phase, w_in, w_out, feed, initial_state, shifted, store, rows = inputs
    ctx.save_for_backward(u, log_decay, phase, w_in, w_out, feed, initial_state, output[2])
    ctx.settings = (shifted, store, rows)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_last, _grad_saved):
    u, log_decay, phase, w_in, w_out, feed, initial_state, saved = ctx.saved_tensors
    if grad_y is None:
        grad_y = u.new_zeros((*u.shape[:2], w_out.shape[0]))
    grads = lti_core_backward(
        grad_y, grad_last, u, log_decay, phase, w_in, w_out, feed, initial_state, saved, *ctx.settings,
        ctx.needs_input_grad[0],
    )  # fmt: skip
    grad_u, grad_decay, grad_phase, grad_in, grad_out, grad_feed, grad_state = grads
    return (
        grad_u if ctx.needs_input_grad[0] else None,
        grad_decay,
        grad_phase,
        grad_in,
        grad_out,
        None if feed is None else grad_feed,
        None if initial_state is None else grad_state,
        None,
        None,
        None,
    )


lti_core.register_autograd(_backward, _setup_context)


def block_tables(
    log_decay: Tensor, phase: Tensor, w_in: Tensor, w_out: Tensor, D: Tensor | None, tau: int
) -> BlockTables:
    """As :func:`compressm.kernels._lti_scan_block.block_tables`, in one op; all float32."""
    return BlockTables(*lti_tables(log_decay, phase, w_in, w_out, D, tau))


@custom_op("compressm::lti_tables", differentiable=True)
def lti_tables(
    log_decay: Tensor, phase: Tensor, w_in: Tensor, w_out: Tensor, D: Tensor | None, tau: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tau-blocked system: log_decay (N,), phase (N,), w_in (2N, tau H), w_out (tau H_out, 2N), feed (tau H_out, tau H)."""
    return _cpp.library().lti_tables(log_decay, phase, w_in, w_out, D, tau)


@lti_tables.register_fake
def _(log_decay, phase, w_in, w_out, D, tau):
    (n2, channels), outputs = w_in.shape, w_out.shape[0]
    shapes = (n2, tau * channels), (tau * outputs, n2), (tau * outputs, tau * channels)
    return tuple(w_in.new_empty(shape) for shape in (log_decay.shape, phase.shape, *shapes))


@custom_op("compressm::lti_tables_backward")
def lti_tables_backward(
    grad_blocked_decay: Tensor,
    grad_blocked_phase: Tensor,
    grad_blocked_in: Tensor,
    grad_blocked_out: Tensor,
    grad_blocked_feed: Tensor,
    log_decay: Tensor,
    phase: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    blocked_out: Tensor,
    tau: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (log_decay, phase, w_in, w_out, D); D's is empty where there cannot be one."""
    return _cpp.library().lti_tables_backward(
        grad_blocked_decay, grad_blocked_phase, grad_blocked_in, grad_blocked_out, grad_blocked_feed,
        log_decay, phase, w_in, w_out, blocked_out, tau,
    )  # fmt: skip


@lti_tables_backward.register_fake
def _(grad_decay, grad_phase, grad_in, grad_out, grad_feed, log_decay, phase, w_in, w_out, blocked_out, tau):
    grad_D = w_in.new_empty((w_in.shape[1] if w_in.shape[1] == w_out.shape[0] else 0,))
    return (*(torch.empty_like(t) for t in (log_decay, phase, w_in, w_out)), grad_D)


def _tables_setup_context(ctx, inputs, output):
    log_decay, phase, w_in, w_out, D, ctx.tau = inputs
    ctx.has_D = D is not None
    ctx.save_for_backward(log_decay, phase, w_in, w_out, output[3])


def _tables_backward(ctx, *grads):
    *grads, grad_D = lti_tables_backward(*grads, *ctx.saved_tensors, ctx.tau)
    return *grads, grad_D if ctx.has_D else None, None


lti_tables.register_autograd(_tables_backward, _tables_setup_context)
