"""Triton backend of the short causal convolution: a program takes a stretch of steps of one channel, a lane per step.

The neighbouring steps that a lane needs come through the cache.  The backward computes the activation's gradient once per
tap instead of keeping it.  Programs have their own partial gradients of weight and bias, added in a fixed order.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
from torch import Tensor

from compressm.kernels.core import triton_language
from compressm.kernels.core.triton_language import jit, tl

Config = dict[str, int | bool]  # BT steps of a program, and launch options
CONFIG: Config = {"BT": 512, "num_warps": 4, "enable_fp_fusion": True}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 8


@jit
def _place(D, stretches, BT: tl.constexpr):
    """Sequence, channel, row among all (sequence, channel) and first step of this program, in 64 bits."""
    program = tl.program_id(0).to(tl.int64)
    row = program // stretches
    stretch = program % stretches
    return row // D, row % D, row, stretch * BT


@jit
def _inputs(x, state, row, t, L, stretches, WIDTH: tl.constexpr):
    """Inputs at steps t in float32: from x, in front of it from state or zero, behind it zero."""
    value = tl.load(x + t, mask=(t >= 0) & (t < L), other=0.0).to(tl.float32)
    if state is not None and WIDTH > 1 and tl.program_id(0) % stretches == 0:
        before = (t < 0) & (t >= 1 - WIDTH)
        value += tl.load(state + row * (WIDTH - 1) + (WIDTH - 1) + t, mask=before, other=0.0)
    return value


@jit
def _window(x, state, row, t, L, stretches, WIDTH: tl.constexpr):
    """The inputs at steps t, t + 1, .. t + 2 (WIDTH - 1), which WIDTH neighbouring outputs see."""
    window = ()
    for k in tl.static_range(2 * WIDTH - 1):
        window = window + (_inputs(x, state, row, t + k, L, stretches, WIDTH),)  # noqa: RUF005, Triton has no starred tuples
    return window


@jit
def _through_silu(grad, value):
    """dL/dvalue of silu(value) from its gradient."""
    s = 1.0 / (1.0 + tl.exp(-value))
    return grad * s * (1.0 + value * (1.0 - s))


_UNSPECIALIZED = ["x", "weight", "bias", "state", "out", "D", "L", "stretches", "stride_b", "stride_d"]


@jit(do_not_specialize=_UNSPECIALIZED)
def _causal_conv1d_fwd_kernel(
    x, weight, bias, state, out, D, L, stretches, stride_b, stride_d,
    WIDTH: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """out_t = act(sum_k weight[d, k] x_{t - WIDTH + 1 + k} + bias[d]).

    x: (batch, D, L) with strides (stride_b, stride_d, 1); out: contiguous, both of one dtype.  weight (D, WIDTH),
    bias (D,) or None and state (batch, D, WIDTH - 1) or None are contiguous float32.
    """
    sequence, channel, row, start = _place(D, stretches, BT)
    t = start + tl.arange(0, BT)
    x += sequence * stride_b + channel * stride_d
    value = tl.zeros([BT], tl.float32)
    if bias is not None:
        value += tl.load(bias + channel)
    for k in tl.static_range(WIDTH):
        value += tl.load(weight + channel * WIDTH + k) * _inputs(x, state, row, t - (WIDTH - 1) + k, L, stretches, WIDTH)
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    tl.store(out + row * L + t, value.to(out.dtype.element_ty), mask=t < L)


@jit(do_not_specialize=[*_UNSPECIALIZED, "grad", "grad_x", "grad_state", "shares", "grad_stride_b", "grad_stride_d"])
def _causal_conv1d_bwd_kernel(
    grad, x, weight, bias, state, grad_x, grad_state, shares, D, L, stretches, stride_b, stride_d, grad_stride_b, grad_stride_d,
    WIDTH: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Gradients of x, of state and each stretch's share of those of weight and bias.

    The stretches begin at step 1 - WIDTH, with the state.  grad: (batch, D, L) with strides (grad_stride_b, grad_stride_d, 1);
    grad_x: contiguous; both in x's dtype.  grad_state: (batch, D, WIDTH - 1) float32 or None.  shares: (batch, D, stretches,
    WIDTH + 1) float32, taps and then bias.
    """
    sequence, channel, row, start = _place(D, stretches, BT)
    t = start - (WIDTH - 1) + tl.arange(0, BT)
    x += sequence * stride_b + channel * stride_d
    grad += sequence * grad_stride_b + channel * grad_stride_d
    shares += (row * stretches + start // BT) * (WIDTH + 1)
    weight += channel * WIDTH
    window = _window(x, state, row, t - (WIDTH - 1), L, stretches, WIDTH)
    flow = tl.zeros([BT], tl.float32)
    for j in tl.static_range(WIDTH):
        s = t + j
        inside = (s >= 0) & (s < L)
        d = tl.load(grad + s, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            value = tl.zeros([BT], tl.float32)
            if bias is not None:
                value += tl.load(bias + channel)
            for k in tl.static_range(WIDTH):
                value += tl.load(weight + k) * window[j + k]
            d = _through_silu(d, value)
        flow += tl.load(weight + WIDTH - 1 - j) * d
        if j == 0:
            for k in tl.static_range(WIDTH):
                tl.store(shares + k, tl.sum(d * window[k]))
            tl.store(shares + WIDTH, tl.sum(d))
    tl.store(grad_x + row * L + t, flow.to(grad_x.dtype.element_ty), mask=(t >= 0) & (t < L))
    if grad_state is not None and WIDTH > 1:
        tl.store(grad_state + row * (WIDTH - 1) + (WIDTH - 1) + t, flow, mask=t < 0)


def why_not(device: str, dtype: torch.dtype, wide: bool, packed: bool) -> str | None:
    """None if the Triton kernels run for tensors of this device type and dtype, else the reason.

    Args:
        wide: more taps than the kernels take.
        packed: whether there are several sequences in a row.
    """
    if dtype == torch.float64:
        return "the Triton kernels compute in float32; float64 runs on the reference"
    if dtype not in DTYPES:
        return f"the Triton kernels take {', '.join(str(d) for d in DTYPES)}, not {dtype}"
    if wide:
        return f"the Triton kernels take up to {MAX_WIDTH} taps; more run on the reference"
    if packed:
        return "the Triton kernels take one sequence a row; seq_idx and cu_seqlens run on the reference"
    return triton_language.why_not(device, _causal_conv1d_fwd_kernel)


def empty_like_output(x: Tensor) -> Tensor:
    """Contiguous memory for a result (batch, D, L)."""
    return x.new_empty(x.shape)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: None,
    initial_states: Tensor | None,
    cu_seqlens: None,
    silu: bool,
    config: Config | None = None,
) -> Tensor:
    """Output (batch, D, L), contiguous, in x's dtype; x is copied unless steps lie next to each other in memory."""
    config = config or CONFIG
    x, out = _rows(x), empty_like_output(x)
    batch, channels, length = x.shape
    weight, bias, state = (None if t is None else t.contiguous() for t in (weight, bias, initial_states))
    stretches = -(-length // config["BT"])
    if programs := batch * channels * stretches:
        with triton_language.on_device(x):
            _causal_conv1d_fwd_kernel[(programs,)](
                x, weight, bias, state, out, channels, length, stretches, x.stride(0), x.stride(1),
                WIDTH=weight.shape[1], SILU=silu, **config,
            )  # fmt: skip
    return out


def backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: None,
    initial_states: Tensor | None,
    cu_seqlens: None,
    silu: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias, initial_states), contiguous; the last two empty for None."""
    config = config or CONFIG
    x, grad_out, grad_x = _rows(x), _rows(grad_out), empty_like_output(x)
    batch, channels, length = x.shape
    weight, bias, state = (None if t is None else t.contiguous() for t in (weight, bias, initial_states))
    width = weight.shape[1]
    grad_state = None if state is None else torch.empty_like(state)
    stretches = -(-(length + width - 1) // config["BT"])
    shares = weight.new_empty((batch, channels, stretches, width + 1))
    if programs := batch * channels * stretches:
        with triton_language.on_device(x):
            _causal_conv1d_bwd_kernel[(programs,)](
                grad_out, x, weight, bias, state, grad_x, grad_state, shares, channels, length, stretches,
                x.stride(0), x.stride(1), grad_out.stride(0), grad_out.stride(1), WIDTH=width, SILU=silu, **config,
            )  # fmt: skip
    grad_weight, grad_bias = shares.sum((0, 2)).split([width, 1], -1)
    empty = weight.new_empty((0,))
    return (
        grad_x,
        grad_weight.clone(memory_format=torch.contiguous_format),
        empty if bias is None else grad_bias[:, 0].clone(memory_format=torch.contiguous_format),
        torch.empty_like(empty) if state is None else grad_state,
    )


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself where steps lie next to each other in memory, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
