"""Triton backend of the decode step: a program updates BD channels of one sequence, BN states at a time."""

# mypy: ignore-errors
from __future__ import annotations

import torch
from torch import Tensor

from compressm.kernels.core import slots, triton_language
from compressm.kernels.core.triton_language import jit, tl
from compressm.kernels.selective_scan import triton_tiles as tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ELEMENTS = 512  # of a tile of channels and states: four a lane of 4 warps
MAX_STATES = 128  # of a tile


@jit
def _load(p, offset, mask):
    return tl.load(p + offset, mask=mask, other=0.0).to(tl.float32)


@jit(
    do_not_specialize=[
        "state", "rows", "x", "dt", "A", "B", "C", "D", "z", "bias", "out", "width", "head", "channels", "N", "state_b",
        "state_d", "state_n", "x_b", "x_d", "dt_b", "dt_d", "z_b", "z_d",
    ]
)  # fmt: skip
def _selective_state_update_kernel(
    state, rows, x, dt, A, B, C, D, z, bias, out, width, head, channels, N,
    state_b, state_d, state_n, x_b, x_d, dt_b, dt_d, z_b, z_d,
    SOFTPLUS: tl.constexpr, TIED: tl.constexpr, FAST: tl.constexpr, DENSE: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """state (pool, width, N) in place, and out (batch, width), contiguous.

    rows (batch,) int64: each entry's row of the pool, negative for none; None: its own.  A (width, N), B and C (batch, width /
    channels, N), D and bias (width,) are contiguous, of any float dtype; head and channels: channels of a head and of a group.
    TIED: A, bias (width / head,) and dt (batch, width / head) have one number a head.  DENSE: the state's last stride is 1.
    """
    blocks = tl.cdiv(width, BD)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    place = row
    end = width
    if rows is not None:
        place = tl.load(rows + row)
        end = tl.where(place >= 0, width, 0)
    inside = d < end
    wide = d.to(tl.int64)
    if TIED:
        own = wide // head
    else:
        own = wide
    input_ = _load(x, row * x_b + wide * x_d, inside)
    gain = _load(dt, row * dt_b + own * dt_d, inside)
    if bias is not None:
        gain += _load(bias, own, inside)
    if SOFTPLUS:
        gain = tiles.softplus(gain)
    drive = gain * input_
    mixing = (row * (width // channels) + d // channels) * N
    state += place * state_b
    result = tl.zeros([BD], tl.float32)
    if D is not None:
        result = _load(D, d, inside) * input_
    if TIED:
        fade = tl.exp2(gain * (_load(A, own, inside) * 1.4426950408889634))[:, None]
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        mask = inside[:, None] & (n < N)[None, :]
        if TIED:
            decay = fade
        else:
            decay = tl.exp2(gain[:, None] * (_load(A, (wide * N)[:, None] + n[None, :], mask) * 1.4426950408889634))
        if DENSE:
            p = state + ((wide * state_d)[:, None] + n[None, :])
        else:
            p = state + ((wide * state_d)[:, None] + (n.to(tl.int64) * state_n)[None, :])
        h = decay * tl.load(p, mask=mask, other=0.0).to(tl.float32)
        h += drive[:, None] * _load(B, mixing[:, None] + n[None, :], mask)
        tl.store(p, h.to(state.dtype.element_ty), mask=mask)
        result += tl.sum(h * _load(C, mixing[:, None] + n[None, :], mask), 1)
    if z is not None:
        gate = _load(z, row * z_b + wide * z_d, inside)
        result *= gate * tiles.sigmoid(gate, FAST)
    tl.store(out + row * width + d, result.to(out.dtype.element_ty), mask=d < width)


def why_not(device: str, dtype: torch.dtype) -> str | None:
    """None if the Triton kernel runs for tensors of this device type and dtype, else the reason."""
    if dtype == torch.float64:
        return "the Triton kernels compute in float32; float64 runs on the reference"
    if dtype not in DTYPES:
        return f"the Triton kernels take {', '.join(str(d) for d in DTYPES)}, not {dtype}"
    return triton_language.why_not(device, _selective_state_update_kernel)


def config(states: int) -> dict[str, int | bool]:
    """Tile of BD channels and BN states, and launch options."""
    BN = 4
    while BN < min(states, MAX_STATES):
        BN *= 2
    return {"BD": ELEMENTS // BN, "BN": BN, "num_warps": 128 // triton_language.WARP, "enable_fp_fusion": True}


def state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    indices: Tensor | None,
    targets: Tensor | None,
    dt_softplus: bool,
    pad: int,
    launch: dict[str, int | bool] | None = None,
) -> Tensor:
    """Advance the picked rows of state (pool, H, P, N) in place and return the output (batch, H, P) in x's dtype.

    B and C are (batch, G, N).  Tensors may differ in dtype; the arithmetic is float32 and the state is rounded once, when it is
    stored.  launch: None for :func:`config`'s.
    """
    rest = (x, dt, A, B, C, D, z, dt_bias)
    if targets is not None:  # no entry may write what another one has yet to read

        def step(copies: Tensor) -> tuple[Tensor, Tensor]:
            return _advance(copies, None, *rest, dt_softplus, launch), copies

        return slots.through_copies(step, state, indices, targets, pad)
    rows = None
    if indices is not None:
        picked, valid = slots.pick(indices, pad)
        rows = torch.where(valid, picked, -1)
    return _advance(state, rows, *rest, dt_softplus, launch)


def _advance(
    state: Tensor,
    rows: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    launch: dict[str, int | bool] | None,
) -> Tensor:
    """As :func:`state_update`; rows (batch,) int64, negative for an entry that has none."""
    slots.check_apart(state)
    batch, heads, head = x.shape
    states, width = state.shape[3], heads * head
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch = launch or config(states)
    tied = _one(A, 2) and _one(dt, 1) and (dt_bias is None or _one(dt_bias, 1))
    if tied:
        A, dt, dt_bias = A[:, :1, :1], dt[..., :1], None if dt_bias is None else dt_bias[:, :1]
    x, dt, z = (None if t is None else t.flatten(1) for t in (x, dt, z))  # views, but for odd strides
    A, B, C, D, dt_bias = (None if t is None else t.contiguous() for t in (A, B, C, D, dt_bias))
    flat = state.flatten(1, 2)
    if programs := batch * -(-width // launch["BD"]):
        with triton_language.on_device(x):
            _selective_state_update_kernel[(programs,)](
                flat, rows, x, dt, A, B, C, D, z, dt_bias, out, width, head, width // B.shape[1], states,
                *flat.stride(), *x.stride(), *dt.stride(), *((0, 0) if z is None else z.stride()),
                SOFTPLUS=dt_softplus, TIED=tied, FAST=x.is_cuda and torch.version.hip is None, DENSE=flat.stride(2) == 1,
                **launch,
            )  # fmt: skip
    if flat.data_ptr() != state.data_ptr():
        state.copy_(flat.view(state.shape))
    return out


def _one(tensor: Tensor, axes: int) -> bool:
    """Whether there is but one number along the last axes, in memory too."""
    last = zip(tensor.shape[-axes:], tensor.stride()[-axes:], strict=True)
    return all(size == 1 or stride == 0 for size, stride in last)
