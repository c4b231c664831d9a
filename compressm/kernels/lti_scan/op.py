"""Linear time-invariant scan with diagonal complex state: what an LRU, S5 or S4D layer runs on every token."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels.core import cpp
from compressm.kernels.core.custom_op import custom_op, plain_call, recomputed_gradients, transformed
from compressm.kernels.core.dispatch import chooser
from compressm.kernels.core.plan import KernelPlan
from compressm.kernels.diagonal_scan import reference
from compressm.kernels.diagonal_scan.op import candidates, scan_op
from compressm.kernels.lti_scan import block
from compressm.kernels.lti_scan.form import plan_lti_scan

choose_backend = chooser("lti_scan", candidates)


class Operands(NamedTuple):
    """Planar operands of a scan: w_in (2N, H) = [Re B; Im B], w_out (H_out, 2N) = [Re C, -Im C]."""

    log_decay: Tensor
    phase: Tensor
    w_in: Tensor
    w_out: Tensor
    D: Tensor | None


def lti_scan(
    u: Tensor,
    log_lam: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y_t = Re(C h_t) + D u_t with h_t = exp(log_lam) h_{t-1} + B u_t; the current input enters the current state.

    Args:
        u: (batch, L, H) real; float32, bfloat16 or float16 (float64 on the reference).
        log_lam: (N,) complex, logarithm of the eigenvalues.
        B: (N, H) complex.
        C: (H_out, N) complex.
        D: (H,) real, needs H_out == H; None for no feedthrough.
        initial_state: (batch, N) complex, None for zero.
        return_last_state: also return h_L (batch, N) complex.
        backend: ``"triton"``, ``"cpp"`` or ``"reference"``; None chooses.

    Returns:
        y (batch, L, H_out) in u's dtype, or (y, last state).  State and accumulation are float32 (float64 for float64
        inputs).  Every tensor argument is differentiable, the states included.

    Raises:
        ArgumentError: shapes or dtypes do not fit.  BackendError: the named backend cannot run.
    """
    for name, tensor in (("log_lam", log_lam), ("B", B), ("C", C)):
        _check_complex(name, tensor)
    result = lti_scan_planar(
        u, log_lam.real, log_lam.imag, B.real, B.imag, C.real, C.imag, D,
        initial_state=planar(initial_state, u, log_lam), return_last_state=return_last_state, backend=backend,
    )  # fmt: skip
    if not return_last_state:
        return result
    y, last = result
    return y, torch.complex(*last.chunk(2, -1))


def lti_scan_planar(
    u: Tensor,
    log_decay: Tensor,
    phase: Tensor,
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
    """:func:`lti_scan` without complex tensors: log_lam = log_decay + i phase, states planar (batch, 2N) [re | im]."""
    check_arguments(("u", u), {"log_lam": log_decay, "phase": phase}, B_re, B_im, C_re, C_im, D, initial_state)
    chosen = choose_backend(u.device.type, u.dtype, backend=backend)
    work = torch.promote_types(u.dtype, torch.float32)
    with without_autocast(u.device.type):
        operands = Operands(
            log_decay.to(work),
            phase.to(work),
            torch.cat([B_re, B_im], 0).to(work),
            torch.cat([C_re, -C_im], 1).to(work),
            None if D is None else D.to(work),
        )
        y, last = scan(u, operands, initial_state, chosen, stepwise(u.dtype, backend))
    return (y, last) if return_last_state else y


def planar(state: Tensor | None, u: Tensor, eigenvalues: Tensor) -> Tensor | None:
    """A complex initial state (batch, N) as [re | im], (batch, 2N) real, for an input u (batch, L, H) and N eigenvalues.

    Raises:
        ArgumentError: it is of another shape, or not complex.
    """
    if state is None:
        return None
    _check_complex("initial_state", state)
    shape = (u.shape[0], eigenvalues.shape[-1])
    if u.dim() == 3 and tuple(state.shape) != shape:
        remedy = "A state from before a reduction has more states: begin anew, from None."
        raise bad_argument("initial_state", got=f"shape {tuple(state.shape)}", expected=f"(batch, N) = {shape}", remedy=remedy)
    return torch.cat([state.real, state.imag], -1)


def _check_complex(name: str, tensor: Tensor) -> None:
    if not tensor.is_complex():
        raise bad_argument(name, got=str(tensor.dtype), expected="a complex tensor", remedy="Convert with .cfloat().")


def without_autocast(device: str) -> AbstractContextManager:
    """Keep the products in float32: autocast would round the state, and the compiled backends take one dtype."""
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()


def stepwise(dtype: torch.dtype, backend: str | None) -> bool:
    """Whether the reference walks step by step, as the oracle does: where it was asked for by name, and in float64."""
    return backend == "reference" or dtype == torch.float64


def plan_for_shapes(
    device: str, dtype: torch.dtype, batch: int, length: int, channels: int, outputs: int, states: int, backend: str | None
) -> KernelPlan:
    """The plan that :func:`lti_scan` follows for an input (batch, length, channels)."""
    chosen = choose_backend(device, dtype, backend=backend)
    if chosen == "reference" and stepwise(dtype, backend):
        return KernelPlan("lti_scan", "reference", "scan", (), "one step at a time")
    return plan_lti_scan(chosen, batch, length, channels, outputs, states, device != "cpu")


@functools.lru_cache(maxsize=4096)
def launch(
    backend: str, batch: int, length: int, channels: int, outputs: int, states: int, gpu: bool
) -> tuple[int, int, bool]:
    """(tau, tile rows, store states) of a backend's plan."""
    chosen = dict(plan_lti_scan(backend, batch, length, channels, outputs, states, gpu).config)
    return chosen.get("tau", 1), chosen.get("rows", 1), bool(chosen.get("store", 0))


def scan(
    u: Tensor, operands: Operands, initial_state: Tensor | None, backend: str, stepwise: bool
) -> tuple[Tensor, Tensor]:
    """y in u's dtype and the last state (batch, 2N), in the operands' dtype; stepwise: in no other form than the reference's.

    Where something traces the call, all of it is one op.
    """
    if plain_call(u, *operands, initial_state) or (backend == "reference" and transformed()):
        return _planned(u, operands, initial_state, backend, stepwise)
    return lti_scan_op(u, *operands, initial_state, backend, stepwise)


@custom_op("compressm::lti_scan")
def lti_scan_op(
    u: Tensor,
    log_decay: Tensor,
    phase: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    backend: str,
    stepwise: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`scan`; the arguments are what its backward keeps."""
    with without_autocast(u.device.type):
        y, last = _planned(u, Operands(log_decay, phase, w_in, w_out, D), initial_state, backend, stepwise)
    return y.contiguous(), last.clone(memory_format=torch.contiguous_format)


@lti_scan_op.register_fake
def _(u, log_decay, phase, w_in, w_out, D, initial_state, backend, stepwise):
    return u.new_empty((*u.shape[:2], w_out.shape[0])), w_in.new_empty((u.shape[0], w_in.shape[0]))


@custom_op("compressm::lti_scan_backward")
def lti_scan_backward_op(
    grad_y: Tensor | None,
    grad_last: Tensor | None,
    u: Tensor,
    log_decay: Tensor,
    phase: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    backend: str,
    stepwise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (u, log_decay, phase, w_in, w_out, D, initial_state); empty for an argument that was None."""

    def run(u: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *operands, start = rest
        return _planned(u, Operands(*operands), start, backend, stepwise)

    with without_autocast(u.device.type):
        return recomputed_gradients(run, (u, log_decay, phase, w_in, w_out, D, initial_state), (grad_y, grad_last))


@lti_scan_backward_op.register_fake
def _(grad_y, grad_last, u, log_decay, phase, w_in, w_out, D, initial_state, backend, stepwise):
    arguments = (u, log_decay, phase, w_in, w_out, D, initial_state)
    return tuple(u.new_empty((0,)) if t is None else torch.empty_like(t) for t in arguments)


def _setup_context(ctx, inputs, output):
    *tensors, backend, stepwise = inputs
    ctx.how = backend, stepwise
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_last):
    grads = lti_scan_backward_op(grad_y, grad_last, *ctx.saved_tensors, *ctx.how)
    return (*(None if t is None else grad for t, grad in zip(ctx.saved_tensors, grads, strict=True)), None, None)


lti_scan_op.register_autograd(_backward, _setup_context)


def _planned(
    u: Tensor, operands: Operands, initial_state: Tensor | None, backend: str, stepwise: bool
) -> tuple[Tensor, Tensor]:
    """:func:`scan` in the form that the plan chooses for these sizes, differentiable."""
    dtype, outputs, states = operands.log_decay.dtype, operands.w_out.shape[0], operands.log_decay.shape[0]
    how = (1, 1, False) if stepwise else launch(backend, *u.shape, outputs, states, u.device.type != "cpu")
    start = None if initial_state is None else initial_state.to(dtype)
    y, last = _run(u.to(dtype), operands, start, backend, *how)
    return y.to(u.dtype), last


def _run(
    u: Tensor, operands: Operands, start: Tensor | None, backend: str, tau: int, rows: int, store: bool
) -> tuple[Tensor, Tensor]:
    """The plain scan, or a short scan over the first L % tau steps and the blocked form for the rest."""
    if tau == 1 or u.shape[1] == 0:
        return _core(u, operands, start, backend, rows, store, shifted=False)
    batch, length, channels = u.shape
    head = length % tau
    parts = []
    if head:
        y, start = _core(u[:, :head], operands, start, backend, rows, store, shifted=False)
        parts.append(y)
    tables = cpp.library().lti_tables if backend == "cpp" else block.block_tables
    blocked = Operands(*tables(*operands, tau))
    body = u[:, head:].reshape(batch, length // tau, tau * channels)
    y, last = _core(body, blocked, start, backend, rows, store, shifted=True)
    parts.append(y.reshape(batch, length - head, operands.w_out.shape[0]))
    return (torch.cat(parts, 1) if head else parts[0]), last


def _core(
    u: Tensor, operands: Operands, start: Tensor | None, backend: str, rows: int, store: bool, *, shifted: bool
) -> tuple[Tensor, Tensor]:
    """One LTI scan with dense matrices; shifted: the output sees h_{t-1} and D is a dense feedthrough."""
    log_decay, phase, w_in, w_out, feed = operands
    if backend == "cpp":
        store = store and torch.is_grad_enabled()
        y, last, _ = cpp.library().lti_core(u, log_decay, phase, w_in, w_out, feed, start, shifted, store, rows)
        return y, last
    x = u @ w_in.T
    if backend == "triton":
        states = scan_op(x, log_decay, phase, start, False, backend)
    else:
        states = reference.diagonal_scan(x, log_decay, phase, start)
    if start is None:
        start = x.new_zeros((u.shape[0], w_in.shape[0]))
    last = states[:, -1] if u.shape[1] else start
    if shifted:
        states = torch.cat([start[:, None], states[:, :-1]], 1)
    y = states @ w_out.T
    if feed is not None:
        y = y + (u @ feed.T if feed.dim() == 2 else u * feed)
    return y, last


def check_arguments(
    named_input: tuple[str, Tensor],
    vectors: Mapping[str, Tensor],
    B_re: Tensor,
    B_im: Tensor,
    C_re: Tensor,
    C_im: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    """Raises ArgumentError unless everything fits the input and the first of the vectors (N,)."""
    input_name, u = named_input
    if u.dim() != 3 or not u.is_floating_point():
        got = f"{tuple(u.shape)} of {u.dtype}"
        raise bad_argument(input_name, got=got, expected="a real tensor (batch, length, channels)")
    first, vector = next(iter(vectors.items()))
    if vector.dim() != 1:
        raise bad_argument(first, got=f"shape {tuple(vector.shape)}", expected="one eigenvalue per state, shape (N,)")
    batch, _, channels = u.shape
    states, outputs = vector.shape[0], C_re.shape[0]
    expected = {
        **{name: (tensor, (states,)) for name, tensor in vectors.items()},
        "B": (B_re, (states, channels)),
        "Im B": (B_im, (states, channels)),
        "C": (C_re, (outputs, states)),
        "Im C": (C_im, (outputs, states)),
        "D": (D, (channels,)),
        "initial_state": (initial_state, (batch, 2 * states)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise bad_argument(name, got=f"shape {tuple(tensor.shape)}", expected=f"{shape}", remedy=f"N is {first}'s length.")
        if tensor is not None and not tensor.is_floating_point():
            raise bad_argument(name, got=str(tensor.dtype), expected="a real floating-point tensor")
        if tensor is not None and tensor.device != u.device:
            raise bad_argument(name, got=f"device {tensor.device}", expected=f"{u.device}, where {input_name} is")
    if D is not None and outputs != channels:
        raise bad_argument("D", got=f"{channels} inputs, {outputs} outputs", expected="as many outputs as inputs, or D=None")
