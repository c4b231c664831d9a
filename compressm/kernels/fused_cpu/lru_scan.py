"""The linear recurrent unit as a function of its parameters (Orvieto et al., ICML 2023, arXiv 2303.06349)."""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.kernels.core import cpp
from compressm.kernels.core.custom_op import plain_call
from compressm.kernels.fused_cpu import lru_reference
from compressm.kernels.lti_scan.op import (
    Operands,
    check_arguments,
    choose_backend,
    launch,
    planar,
    scan,
    stepwise,
    without_autocast,
)


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
    start = planar(initial_state, x, nu_log)
    check_arguments(("x", x), vectors, B_re, B_im, C_re, C_im, D, start)
    chosen = choose_backend(x.device.type, x.dtype, backend=backend)
    work = torch.promote_types(x.dtype, torch.float32)
    parameters = [t.to(work) for t in (nu_log, theta_log, gamma_log, B_re, B_im, C_re, C_im)]
    skip = None if D is None else D.to(work)
    if chosen == "cpp" and plain_call(x, *parameters, skip, start):
        how = launch(chosen, *x.shape, C_re.shape[0], nu_log.shape[0], False)
        y, last = scan_in_one_op(x.to(work), parameters, skip, start, *how)
        y = y.to(x.dtype)
    else:
        with without_autocast(x.device.type):
            operands = Operands(*lru_reference.lru_operands(*parameters), skip)
            y, last = scan(x, operands, start, chosen, stepwise(x.dtype, backend))
    return (y, torch.complex(*last.chunk(2, -1))) if return_last_state else y


def scan_in_one_op(
    x: Tensor, parameters: list[Tensor], D: Tensor | None, start: Tensor | None, tau: int, rows: int, store: bool
) -> tuple[Tensor, Tensor]:
    """y and the last state (batch, 2N), float32, by the C++ library's op, which has its gradient there (``lru.cpp``)."""
    start = None if start is None else start.to(x.dtype)
    y, last, _ = cpp.library().lru_scan(x, *parameters, D, start, tau, rows, store and torch.is_grad_enabled())
    return y, last
