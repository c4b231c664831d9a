"""The linear recurrent unit as a function of its parameters (Orvieto et al., ICML 2023, arXiv 2303.06349)."""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.kernels import _cpp, _lru_ref
from compressm.kernels._custom_op import custom_op
from compressm.kernels.lti_scan import Operands, check_arguments, launch, planar, scan, without_autocast


def lru_scan(
    x: Tensor,
    nu_log: Tensor,
    theta_log: Tensor,
    gamma_log: Tensor,
    B_re: Tensor,
    B_im: Tensor,
    C_re: Tensor,
    C_im: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y_t = Re(C h_t) + D x_t,  h_t = lam h_{t-1} + exp(gamma_log) (B x_t),  lam = exp(-exp(nu_log) + i exp(theta_log)).

    :func:`compressm.kernels.lti_scan` of an LRU's parameters (eq. 7 and section 3.4 of the paper), all of them real.

    Args:
        x: (batch, L, H) real; float32, bfloat16 or float16 (float64 on the reference).
        nu_log, theta_log, gamma_log: (N,).
        B_re, B_im: (N, H).
        C_re, C_im: (H_out, N).
        D: (H,), needs H_out == H; None for no feedthrough.
        initial_state, return_last_state, backend: as in :func:`compressm.kernels.lti_scan`.

    Returns:
        y (batch, L, H_out) in x's dtype, or (y, last state (batch, N) complex).  Every tensor argument is differentiable.

    Raises:
        ArgumentError: shapes or dtypes do not fit.  BackendError: the named backend cannot run.
    """
    vectors = {"nu_log": nu_log, "theta_log": theta_log, "gamma_log": gamma_log}
    start = planar(initial_state)
    check_arguments(("x", x), vectors, B_re, B_im, C_re, C_im, D, start)
    how = launch(x.device.type, x.dtype, *x.shape, C_re.shape[0], nu_log.shape[0], backend)
    work = torch.promote_types(x.dtype, torch.float32)
    parameters = [t.to(work) for t in (nu_log, theta_log, gamma_log, B_re, B_im, C_re, C_im)]
    with without_autocast(x.device.type):
        operands = (lru_operands_op if how[0] == "cpp" else _lru_ref.lru_operands)(*parameters)
        y, last = scan(x, Operands(*operands, None if D is None else D.to(work)), start, *how)
    return (y, torch.complex(*last.chunk(2, -1))) if return_last_state else y


@custom_op("compressm::lru_operands", differentiable=True)
def lru_operands_op(
    nu_log: Tensor, theta_log: Tensor, gamma_log: Tensor, B_re: Tensor, B_im: Tensor, C_re: Tensor, C_im: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log_decay (N,), phase (N,), w_in (2N, H), w_out (H_out, 2N) by the C++ kernel, float32."""
    return _cpp.library().lru_operands(nu_log, theta_log, gamma_log, B_re, B_im, C_re, C_im)


@lru_operands_op.register_fake
def _(nu_log, theta_log, gamma_log, B_re, B_im, C_re, C_im):
    (states, channels), outputs = B_re.shape, C_re.shape[0]
    return tuple(B_re.new_empty(shape) for shape in ((states,), (states,), (2 * states, channels), (outputs, 2 * states)))


@custom_op("compressm::lru_operands_backward")
def lru_operands_backward_op(
    grad_log_decay: Tensor,
    grad_phase: Tensor,
    grad_w_in: Tensor,
    grad_w_out: Tensor,
    gamma_log: Tensor,
    log_decay: Tensor,
    phase: Tensor,
    w_in: Tensor,
    w_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (nu_log, theta_log, gamma_log, B_re, B_im, C_re, C_im)."""
    return _cpp.library().lru_operands_backward(
        grad_log_decay, grad_phase, grad_w_in, grad_w_out, gamma_log, log_decay, phase, w_in, w_out
    )


@lru_operands_backward_op.register_fake
def _(grad_log_decay, grad_phase, grad_w_in, grad_w_out, gamma_log, log_decay, phase, w_in, w_out):
    (states,), channels, outputs = gamma_log.shape, w_in.shape[1], w_out.shape[0]
    shapes = ((states,),) * 3 + ((states, channels),) * 2 + ((outputs, states),) * 2
    return tuple(w_in.new_empty(shape) for shape in shapes)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[2], *output)


def _backward(ctx, *grads):
    return lru_operands_backward_op(*grads, *ctx.saved_tensors)


lru_operands_op.register_autograd(_backward, _setup_context)
