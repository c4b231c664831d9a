"""Triton backend of the diagonal scan: sequential in time, one lane per complex state, U steps of loads in flight.

A program walks one stretch of one sequence for BN states.  The stretch is the whole sequence where sequences and states
fill a GPU; else sequences are split, and the states in front of the stretches come from a scan over the stretches' ends.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
from torch import Tensor

from compressm.kernels.core import triton_language
from compressm.kernels.core.triton_language import jit, tl

# A program is a warp with one complex state a lane; the loads of U steps are in flight.
Config = dict[str, int | bool]  # BN states of a program and U steps, and launch options
FORWARD_CONFIG: Config = {"BN": triton_language.WARP, "U": 16, "num_warps": 1, "enable_fp_fusion": True}
BACKWARD_CONFIG: Config = {"BN": triton_language.WARP, "U": 8, "num_warps": 1, "enable_fp_fusion": True}

# Warps that fill a GPU, and the fewest steps and stretches for which reading x twice pays.
ENOUGH_PROGRAMS = 512
MIN_STRETCH = 256
MIN_STRETCHES = 4
MAX_OFFSET = 2**31 - 1

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@jit
def _place(N, stretches, BN: tl.constexpr):
    """States (BN,) of this program, and its row among all (sequence, stretch) pairs, its sequence and its stretch."""
    blocks = tl.cdiv(N, BN)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    return program % blocks * BN + tl.arange(0, BN), row, row // stretches, row % stretches


@jit
def _walk(base, sequence, step, L, N, REVERSE: tl.constexpr):
    """Address of the first number of a step of the walk through a sequence (L, 2N)."""
    if REVERSE:
        step = L - 1 - step
    return base + (sequence * L + step) * (2 * N)


@jit
def _load(p, N, offset, mask):
    """The complex numbers at ``offset`` from address p as stored, zeros where masked."""
    re = tl.load(p + offset, mask=mask, other=0.0)
    im = tl.load(p + N + offset, mask=mask, other=0.0)
    return re, im


@jit
def _store(p, N, offset, re, im, mask):
    tl.store(p + offset, re.to(p.dtype.element_ty), mask=mask)
    tl.store(p + N + offset, im.to(p.dtype.element_ty), mask=mask)


@jit
def _append(re, im, a, b):
    return re + (a,), im + (b,)  # noqa: RUF005, Triton has no starred tuples


@jit
def _load_steps(p, N, offset, stride, left, U: tl.constexpr):
    """Real and imaginary parts of U steps, as stored; zeros from each lane's step ``left`` (BN,) on."""
    re = ()
    im = ()
    for k in tl.static_range(U):
        a, b = _load(p, N, offset + k * stride, k < left)
        re, im = _append(re, im, a, b)
    return re, im


@jit
def _load_state(p, N, offset, mask):
    re, im = _load(p, N, offset, mask)
    return re.to(tl.float32), im.to(tl.float32)


@jit
def _advance(lam_re, lam_im, re, im, x_re, x_im):
    """lam (re + i im) + x in float32."""
    new_re = x_re.to(tl.float32) - lam_im * im + lam_re * re
    new_im = x_im.to(tl.float32) + lam_im * re + lam_re * im
    return new_re, new_im


@jit
def _correlate(sum_re, sum_im, g_re, g_im, h_re, h_im):
    """sum + g conj(h) in float32."""
    h_re = h_re.to(tl.float32)
    h_im = h_im.to(tl.float32)
    return sum_re + g_re * h_re + g_im * h_im, sum_im + g_im * h_re - g_re * h_im


@jit(do_not_specialize=["x", "lam", "starts", "h", "L", "N", "stretches", "steps"])
def _diagonal_scan_fwd_kernel(
    x, lam, starts, h, L, N, stretches, steps,
    REVERSE: tl.constexpr, STORE: tl.constexpr, BN: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """h_t = lam h_{t-1} + x_t over the stretches of x (batch, L, 2N).

    lam: (2, N) float32; starts: (batch, stretches, 2N) float32 or None for zeros.  h: every state (batch, L, 2N), or without
    STORE the last one of each stretch, (batch, stretches, 2N) float32, for stretches of whole multiples of U steps.
    """
    n, row, sequence, stretch = _place(N, stretches, BN)
    begin = stretch * steps
    count = tl.minimum(L - begin, steps).to(tl.int32)
    own = tl.where(n < N, count, 0)
    lam_re, lam_im = _load_state(lam, N, n, n < N)
    re = tl.zeros([BN], tl.float32)
    im = tl.zeros([BN], tl.float32)
    if starts is not None:
        re, im = _load_state(starts + row * 2 * N, N, n, n < N)
    x = _walk(x, sequence, begin, L, N, REVERSE)
    if STORE:
        h = _walk(h, sequence, begin, L, N, REVERSE)
    stride = -2 * N if REVERSE else 2 * N
    x_re, x_im = _load_steps(x, N, n, stride, own, U)
    offset = n
    for t in range(0, count, U):
        next_re = ()
        next_im = ()
        for k in tl.static_range(U):
            re, im = _advance(lam_re, lam_im, re, im, x_re[k], x_im[k])
            if STORE:
                _store(h, N, offset, re, im, t + k < own)
            a, b = _load(x, N, offset + U * stride, t + k + U < own)
            next_re, next_im = _append(next_re, next_im, a, b)
            offset += stride
        x_re = next_re
        x_im = next_im
    if not STORE:
        _store(h + row * 2 * N, N, n, re, im, n < N)


@jit(
    do_not_specialize=[
        "grad_h", "h", "lam", "carries", "start", "grad_x", "grad_lam", "grad_start", "L", "N", "stretches", "steps",
    ]
)  # fmt: skip
def _diagonal_scan_bwd_kernel(
    grad_h, h, lam, carries, start, grad_x, grad_lam, grad_start, L, N, stretches, steps,
    REVERSE: tl.constexpr, BN: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """The adjoint g_t = conj(lam) g_{t+1} + grad_h_t, and what it gives lam and the initial state.

    It walks against the forward (REVERSE: towards the past), with carries (batch, stretches, 2N) float32 or None for zeros
    in front of its stretches.  grad_x: g in h's dtype.  grad_lam: (batch, stretches, 2N) float32, each stretch's share of
    the gradients of log_decay and phase, real and imaginary part of sum_t g_t conj(lam h_{t-1}).  start, grad_start:
    (batch, 2N) float32.
    """
    n, row, sequence, stretch = _place(N, stretches, BN)
    begin = stretch * steps
    count = tl.minimum(L - begin, steps).to(tl.int32)
    own = tl.where(n < N, count, 0)
    own_h = tl.where(n < N, tl.minimum(L - begin - 1, steps).to(tl.int32), 0)
    lam_re, lam_im = _load_state(lam, N, n, n < N)
    re = tl.zeros([BN], tl.float32)
    im = tl.zeros([BN], tl.float32)
    if carries is not None:
        re, im = _load_state(carries + row * 2 * N, N, n, n < N)
    sum_re = tl.zeros([BN], tl.float32)
    sum_im = tl.zeros([BN], tl.float32)
    grad_h = _walk(grad_h, sequence, begin, L, N, REVERSE)
    grad_x = _walk(grad_x, sequence, begin, L, N, REVERSE)
    h = _walk(h, sequence, begin + 1, L, N, REVERSE)
    stride = -2 * N if REVERSE else 2 * N
    d_re, d_im = _load_steps(grad_h, N, n, stride, own, U)
    h_re, h_im = _load_steps(h, N, n, stride, own_h, U)
    offset = n
    for t in range(0, count, U):
        part_re = tl.zeros([BN], tl.float32)
        part_im = tl.zeros([BN], tl.float32)
        next_d_re = ()
        next_d_im = ()
        next_h_re = ()
        next_h_im = ()
        for k in tl.static_range(U):
            inside = t + k < own
            a_re = tl.where(inside, lam_re, 1.0)
            a_im = tl.where(inside, -lam_im, 0.0)
            re, im = _advance(a_re, a_im, re, im, d_re[k], d_im[k])
            _store(grad_x, N, offset, re, im, inside)
            part_re, part_im = _correlate(part_re, part_im, re, im, h_re[k], h_im[k])
            a, b = _load(grad_h, N, offset + U * stride, t + k + U < own)
            next_d_re, next_d_im = _append(next_d_re, next_d_im, a, b)
            a, b = _load(h, N, offset + U * stride, t + k + U < own_h)
            next_h_re, next_h_im = _append(next_h_re, next_h_im, a, b)
            offset += stride
        sum_re += part_re
        sum_im += part_im
        d_re = next_d_re
        d_im = next_d_im
        h_re = next_h_re
        h_im = next_h_im
    last = n < tl.where(stretch == stretches - 1, N, 0)
    start_re, start_im = _load_state(start + sequence * 2 * N, N, n, last)
    sum_re, sum_im = _correlate(sum_re, sum_im, re, im, start_re, start_im)
    zero = tl.zeros([BN], tl.float32)
    decay, phase = _advance(lam_re, -lam_im, sum_re, sum_im, zero, zero)
    _store(grad_lam + row * 2 * N, N, n, decay, phase, n < N)
    re, im = _advance(lam_re, -lam_im, re, im, zero, zero)
    _store(grad_start + sequence * 2 * N, N, n, re, im, last)


def why_not(device: str, dtype: torch.dtype) -> str | None:
    """None if the Triton kernels run for tensors of this device type and dtype, else the reason."""
    if dtype == torch.float64:
        return "the Triton kernels compute in float32; float64 runs on the reference"
    if dtype not in DTYPES:
        return f"the Triton kernels take {', '.join(str(d) for d in DTYPES)}, not {dtype}"
    return triton_language.why_not(device, _diagonal_scan_fwd_kernel)


def diagonal_scan_forward(
    x: Tensor,
    log_decay: Tensor,
    phase: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    config: Config = FORWARD_CONFIG,
    stretches: int | None = None,
) -> Tensor:
    """All states (batch, L, 2N) of x (batch, L, 2N) in x's dtype; arguments as in :func:`compressm.kernels.diagonal_scan`.

    stretches: of every sequence; None chooses.
    """
    x = x.contiguous()
    h = torch.empty_like(x)
    if x.numel() == 0:
        return h
    start = None if initial_state is None else initial_state.float().contiguous()
    steps, stretches = _split(*x.shape, stretches)
    starts = start if stretches == 1 else _starts(x, log_decay, phase, start, reverse, steps, stretches)
    _launch_forward(x, _eigenvalues(log_decay, phase), starts, h, steps, stretches, reverse, config, store=True)
    return h


def diagonal_scan_backward(
    grad_h: Tensor,
    h: Tensor,
    log_decay: Tensor,
    phase: Tensor,
    start: Tensor,
    reverse: bool,
    config: Config = BACKWARD_CONFIG,
    stretches: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, log_decay, phase, initial state).

    Args:
        grad_h, h: (batch, L, 2N), gradient of the states and the states, both in x's dtype.
        log_decay, phase: (N,).
        start: (batch, 2N), the state in front of the first step.
        stretches: of every sequence; None chooses.

    Returns:
        grad_x in h's dtype, the gradients of log_decay and phase in theirs, grad_state (batch, 2N) float32.
    """
    batch, _, n2 = h.shape
    grad_h, h, start = grad_h.contiguous(), h.contiguous(), start.float().contiguous()
    grad_x, grad_state = torch.empty_like(h), h.new_empty((batch, n2), dtype=torch.float32)
    if h.numel() == 0:
        return grad_x, torch.zeros_like(log_decay), torch.zeros_like(phase), grad_state.zero_()
    steps, stretches = _split(*h.shape, stretches)
    carries = None if stretches == 1 else _starts(grad_h, log_decay, -phase, None, not reverse, steps, stretches)
    shares = h.new_empty((batch * stretches, 2, n2 // 2), dtype=torch.float32)
    with triton_language.on_device(h):
        _diagonal_scan_bwd_kernel[_grid(batch * stretches, n2 // 2, config)](
            grad_h, h, _eigenvalues(log_decay, phase), carries, start, grad_x, shares, grad_state,
            h.shape[1], n2 // 2, stretches, steps, REVERSE=not reverse, **config,
        )  # fmt: skip
    grad_decay, grad_phase = (shares[:, part].sum(0) for part in (0, 1))
    return grad_x, grad_decay.to(log_decay.dtype), grad_phase.to(phase.dtype), grad_state


def _launch_forward(
    x: Tensor,
    lam: Tensor,
    starts: Tensor | None,
    h: Tensor,
    steps: int,
    stretches: int,
    reverse: bool,
    config: Config,
    *,
    store: bool,
) -> None:
    batch, length, n2 = x.shape
    with triton_language.on_device(x):
        _diagonal_scan_fwd_kernel[_grid(batch * stretches, n2 // 2, config)](
            x, lam, starts, h, length, n2 // 2, stretches, steps, REVERSE=reverse, STORE=store, **config
        )


def _grid(rows: int, states: int, config: Config) -> tuple[int]:
    return (rows * -(-states // config["BN"]),)


def _split(batch: int, length: int, n2: int, wanted: int | None = None) -> tuple[int, int]:
    """(steps of a stretch, stretches of a sequence) from the shape alone, so that results do not depend on the device.

    wanted: number of stretches to come close to; None chooses.
    """
    unit = FORWARD_CONFIG["U"]
    programs = batch * -(-n2 // 64)
    stretches = min(ENOUGH_PROGRAMS // programs, length // MIN_STRETCH)
    if stretches < MIN_STRETCHES:
        stretches = 1
    stretches = wanted or stretches
    longest = (MAX_OFFSET // (n2 * unit) - 1) * unit  # steps that 32-bit offsets from a stretch's first step can reach
    stretches = max(stretches, -(-length // longest))
    steps = length if stretches == 1 else -(-length // (stretches * unit)) * unit
    return steps, -(-length // steps)


def _starts(
    x: Tensor, log_decay: Tensor, phase: Tensor, start: Tensor | None, reverse: bool, steps: int, stretches: int
) -> Tensor:
    """States (batch, stretches, 2N) in front of every stretch, in the order of the walk.

    They obey the same recurrence with lam^steps, driven by the states at the stretches' ends for zero starts.
    """
    batch, _, n2 = x.shape
    ends = x.new_empty((batch, stretches - 1, n2), dtype=torch.float32)
    _launch_forward(
        x, _eigenvalues(log_decay, phase), None, ends, steps, stretches - 1, reverse, FORWARD_CONFIG, store=False
    )
    states = diagonal_scan_forward(ends, log_decay.double() * steps, phase.double() * steps, start, False)
    first = x.new_zeros((batch, n2), dtype=torch.float32) if start is None else start
    return torch.cat([first[:, None], states], 1)


def _eigenvalues(log_decay: Tensor, phase: Tensor) -> Tensor:
    """Real and imaginary parts of exp(log_decay + i phase), (2, N) float32, formed in float64."""
    modulus, angle = log_decay.double().exp(), phase.double()
    return torch.stack([modulus * angle.cos(), modulus * angle.sin()]).float()
