"""The short depthwise causal convolution in front of a Mamba layer's scan, with bias and SiLU, and its decode step."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels.causal_conv1d import cpu, reference
from compressm.kernels.causal_conv1d.cpu import MAX_WIDTH
from compressm.kernels.core import slots
from compressm.kernels.core.custom_op import custom_op, in_cpp, plain_call
from compressm.kernels.core.dispatch import chooser, compiled_first


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """out_t = act(sum_k weight[:, k] x_{t - width + 1 + k} + bias), each channel for itself, zeros in front of x.

    The meaning and the argument order are those of causal-conv1d's ``causal_conv1d_fn``.  The backward recomputes the sum in
    front of the activation, so that only the arguments are kept for it.

    Args:
        x: (batch, D, L), float32, bfloat16 or float16 (float64 on the reference); any strides: on a CPU, channels or steps
            that lie next to each other in memory are read in place, on a GPU steps are.
        weight: (D, width); the last tap meets the present input.  More than 8 taps run on the reference.
        bias: (D,), or None.
        seq_idx: (batch, L) int32 or int64, the number of the sequence that each step belongs to: a step does not see those of
            other sequences.  A negative number is padding, whose output is zero.
        initial_states: (batch, D, width - 1), the inputs in front of x, oldest first; None for zeros.
        return_final_states: also return the last width - 1 inputs, for the sequence's continuation.
        final_states_out: (batch, D, width - 1), memory for the final states, which are written to it.
        activation: ``"silu"``, its other name ``"swish"``, or None.
        cu_seqlens: (sequences + 1,) int32 or int64: batch is 1 and its steps are several sequences one after the other,
            sequence i at cu_seqlens[i] to cu_seqlens[i + 1], each with states of its own (states are then
            (sequences, D, width - 1)).
        initial_state, return_last_state: initial_states and return_final_states by the names that they have in the scans.
        backend: ``"triton"``, ``"cpp"`` or ``"reference"``; None chooses.

    Returns:
        out (batch, D, L) in x's dtype, or (out, final states (batch, D, width - 1) in x's dtype).  Accumulation is float32
        (float64 for float64 inputs).  Every real tensor argument is differentiable.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit, the activation is unknown, seq_idx meets states, or cu_seqlens
            does not add up (which is looked at on CPU tensors only: on a GPU looking would wait for it).
        BackendError: the named backend cannot run.
    """
    if initial_state is not None:
        if initial_states is not None:
            raise bad_argument("initial_states, initial_state", got="both", expected="one of the two names")
        initial_states = initial_state
    return_final_states = return_final_states or return_last_state
    silu = _is_silu(activation)
    _check_tensor("x", x, x, 3, "(batch, D, L)")
    _check_filter(x, weight, bias)
    _check_packing(x, seq_idx, cu_seqlens, initial_states is not None or return_final_states or final_states_out is not None)
    width = weight.shape[1]
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    for name, state in (("initial_states", initial_states), ("final_states_out", final_states_out)):
        if state is not None:
            _check_shape(name, state, x, (sequences, x.shape[1], width - 1))
    packed = seq_idx is not None or cu_seqlens is not None
    wide = True if width > MAX_WIDTH else False  # a constant while torch.compile traces, even where the width is not
    chosen = choose_backend(x.device.type, x.dtype, wide, packed, backend=backend)
    if chosen == "reference":
        out = reference.causal_conv1d(x, weight, bias, seq_idx, initial_states, cu_seqlens, silu)
    else:
        weight, bias, state = weight.float(), None if bias is None else bias.float(), initial_states
        rows = cpu.dtype_of_rows(x, state, packed) if chosen == "cpp" else x.dtype
        if state is not None:
            state = state.to(rows if chosen == "cpp" else torch.float32)
        out = causal_conv1d_op(x.to(rows), weight, bias, seq_idx, state, cu_seqlens, silu, chosen)
        out = out if out.dtype == x.dtype else out.to(x.dtype)
    if not return_final_states and final_states_out is None:
        return out
    final = reference.final_states(x, initial_states, cu_seqlens, width - 1)
    if final_states_out is not None:
        final = final_states_out.copy_(final)
    return (out, final) if return_final_states else out


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    pad_slot_id: int = slots.PAD,
) -> Tensor:
    """The next steps of :func:`causal_conv1d`: takes the inputs x into ``conv_state``, in place, and returns the outputs.

    The meaning and the argument order are those of causal-conv1d's function of this name.

    Args:
        x: (batch, D), one step, or (batch, D, steps).
        conv_state: (batch, D, state_len) with state_len at least width - 1, the last inputs, oldest first; written in place
            in its own dtype and strides.
        weight, bias, activation: as in :func:`causal_conv1d`.
        cache_seqlens: (batch,) int32 or int64, the number of inputs so far, not negative: conv_state is a circular buffer,
            where the next input comes to ``cache_seqlens % state_len``.
        conv_state_indices: (batch,) int32 or int64: conv_state is a pool (pool, D, state_len), of which each entry of x has
            the row of this index.  An entry whose index is negative or ``pad_slot_id`` has none: its output is zero.
        pad_slot_id: the index of an entry that has no state.

    Returns:
        x's shape and dtype, differentiable.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit, the activation is unknown, or conv_state_indices are not rows of
            the pool (which is looked at on CPU tensors only).
    """
    silu = _is_silu(activation)
    _check_tensor("x", x, x, 3 if x.dim() == 3 else 2, "(batch, D) or (batch, D, steps)")
    _check_filter(x, weight, bias)
    (batch, channels), needed = x.shape[:2], weight.shape[1] - 1
    _check_tensor("conv_state", conv_state, x, 3, "(batch, D, state_len)")
    rows = conv_state.shape[0] if conv_state_indices is not None else batch
    if conv_state.shape[:2] != (rows, channels) or conv_state.shape[2] < needed:
        expected = f"shape ({rows}, {channels}, state_len) with state_len at least {needed}, one less than the taps"
        raise bad_argument("conv_state", got=f"shape {tuple(conv_state.shape)}", expected=expected)
    slots.check("conv_state_indices", conv_state_indices, conv_state, batch, pad_slot_id)
    if cache_seqlens is not None:
        _check_integers("cache_seqlens", cache_seqlens, x, (batch,), "(batch,)")
    steps = x if x.dim() == 3 else x[..., None]

    def update(state: Tensor) -> tuple[Tensor, Tensor]:
        return reference.causal_conv1d_update(steps, state, weight, bias, silu, cache_seqlens)

    if conv_state_indices is None:
        out, state = update(conv_state.clone())  # the backward needs it as it was
        conv_state.copy_(state)
    else:
        out = slots.through_copies(update, conv_state, conv_state_indices, None, pad_slot_id)
    return out if x.dim() == 3 else out[..., 0]


# Of (device type, dtype, whether there are more than 8 taps, whether there are several sequences in a row): Triton on a GPU,
# C++ on a CPU, else the reference.
choose_backend = chooser(
    "causal_conv1d",
    lambda device, dtype, wide, packed: compiled_first(
        device,
        lambda: _triton_why_not(device, dtype, wide, packed),
        lambda: cpu.why_not(device, dtype, wide),
    ),
)


def _triton_why_not(device: str, dtype: torch.dtype, wide: bool, packed: bool) -> str | None:
    from compressm.kernels.causal_conv1d import triton_convolution

    return triton_convolution.why_not(device, dtype, wide, packed)


def _backend(name: str):
    if name == "cpp":
        return cpu
    from compressm.kernels.causal_conv1d import triton_convolution

    return triton_convolution


@custom_op("compressm::causal_conv1d", differentiable=in_cpp)
def causal_conv1d_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    backend: str,
) -> Tensor:
    """causal_conv1d on a compiled backend, ``"cpp"`` or ``"triton"``; weight and bias are float32.

    The states are float32 on Triton, on C++ as x: float32, or bfloat16 where x's channels lie next to each other or there are
    several sequences in a row.
    """
    return _backend(backend).forward(x, weight, bias, seq_idx, initial_states, cu_seqlens, silu)


@causal_conv1d_op.register_fake
def _(x, weight, bias, seq_idx, initial_states, cu_seqlens, silu, backend):
    return _backend(backend).empty_like_output(x)


@custom_op("compressm::causal_conv1d_backward")
def causal_conv1d_backward_op(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias, initial_states); empty for an argument that was None."""
    return _backend(backend).backward(grad_out, x, weight, bias, seq_idx, initial_states, cu_seqlens, silu)


@causal_conv1d_backward_op.register_fake
def _(grad_out, x, weight, bias, seq_idx, initial_states, cu_seqlens, silu, backend):
    return (
        _backend(backend).empty_like_output(x),
        weight.new_empty(weight.shape),
        weight.new_empty((0,) if bias is None else bias.shape),
        weight.new_empty((0,)) if initial_states is None else initial_states.new_empty(initial_states.shape),
    )


def _setup_context(ctx, inputs, output):
    *tensors, silu, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = (silu, backend)


def _backward(ctx, grad_out):
    x, weight, bias, seq_idx, initial_states, cu_seqlens = ctx.saved_tensors
    grads = causal_conv1d_backward_op(grad_out, x, weight, bias, seq_idx, initial_states, cu_seqlens, *ctx.settings)
    grad_x, grad_weight, grad_bias, grad_states = grads
    if bias is None:
        grad_bias = None
    return grad_x, grad_weight, grad_bias, None, None if initial_states is None else grad_states, None, None, None


causal_conv1d_op.register_autograd(_backward, _setup_context)


def _is_silu(activation: str | None) -> bool:
    if activation not in ("silu", "swish", None):
        raise bad_argument("activation", got=repr(activation), expected="'silu', 'swish' or None")
    return activation is not None


def _check_tensor(name: str, tensor: Tensor, x: Tensor, axes: int, shape: str) -> None:
    if tensor.dim() != axes or not tensor.is_floating_point():
        raise bad_argument(name, got=f"{tuple(tensor.shape)} of {tensor.dtype}", expected=f"a real tensor {shape}")
    _check_device(name, tensor, x)


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise bad_argument(name, got=f"device {tensor.device}", expected=f"{x.device}, where x is")


def _check_shape(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or not tensor.is_floating_point():
        raise bad_argument(name, got=f"{tuple(tensor.shape)} of {tensor.dtype}", expected=f"a real tensor of shape {shape}")
    _check_device(name, tensor, x)


def _check_integers(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...], axes: str) -> None:
    if tensor.shape != shape or tensor.dtype not in (torch.int32, torch.int64):
        got = f"{tuple(tensor.shape)} of {tensor.dtype}"
        raise bad_argument(name, got=got, expected=f"int32 or int64 {axes} = {tuple(shape)}")
    _check_device(name, tensor, x)


def _check_filter(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    channels = x.shape[1]
    _check_tensor("weight", weight, x, 2, "(D, width)")
    if weight.shape[0] != channels or weight.shape[1] < 1:
        expected = f"shape ({channels}, width), as x has {channels} channels, width at least 1"
        raise bad_argument("weight", got=f"shape {tuple(weight.shape)}", expected=expected)
    if bias is not None:
        _check_shape("bias", bias, x, (channels,))


def _check_packing(x: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None, states: bool) -> None:
    """``states``: whether initial or final states are asked for."""
    batch, _, length = x.shape
    if seq_idx is not None:
        if cu_seqlens is not None or states:
            got = "cu_seqlens with it" if cu_seqlens is not None else "initial or final states with it"
            expected = "neither cu_seqlens nor initial_states, return_final_states or final_states_out with it"
            raise bad_argument("seq_idx", got=got, expected=expected, remedy="cu_seqlens alone goes with states.")
        _check_integers("seq_idx", seq_idx, x, (batch, length), "(batch, L)")
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            got = f"{tuple(cu_seqlens.shape)} of {cu_seqlens.dtype}"
            raise bad_argument("cu_seqlens", got=got, expected="int32 or int64 (sequences + 1,), from 0 to L")
        if batch != 1:
            expected = "a batch of 1, as cu_seqlens packs the sequences along L"
            raise bad_argument("x", got=f"a batch of {batch}", expected=expected)
        _check_device("cu_seqlens", cu_seqlens, x)
        if cu_seqlens.device.type == "cpu" and plain_call(cu_seqlens):
            bounds = cu_seqlens.tolist()
            if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in itertools.pairwise(bounds)):
                raise bad_argument("cu_seqlens", got=bounds, expected=f"numbers that rise from 0 to L = {length}")
