"""The short depthwise causal convolution in front of a Mamba layer's scan, with bias and SiLU, and its decode step."""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels import _causal_conv1d_cpu, _causal_conv1d_ref, _cpp
from compressm.kernels._custom_op import custom_op, in_cpp
from compressm.kernels._dispatch import chooser, compiled_first

MAX_WIDTH = 8


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """out_t = act(sum_k weight[:, k] x_{t - width + 1 + k} + bias), each channel for itself, zeros in front of x.

    The backward recomputes the sum in front of the activation, so that only the arguments are kept for it.

    Args:
        x: (batch, D, L), float32, bfloat16 or float16 (float64 on the reference); any strides: on a CPU, channels or steps
            that lie next to each other in memory are read in place, on a GPU steps are.
        weight: (D, width), width 1 to 8; the last tap meets the present input.
        bias: (D,), or None.
        activation: ``"silu"`` or None.
        initial_state: (batch, D, width - 1), the inputs in front of x, oldest first; None for zeros.
        return_last_state: also return the last width - 1 inputs, for the sequence's continuation.
        backend: ``"triton"``, ``"cpp"`` or ``"reference"``; None chooses.

    Returns:
        out (batch, D, L) in x's dtype, or (out, last state (batch, D, width - 1) in x's dtype).  Accumulation is float32
        (float64 for float64 inputs).  Every tensor argument is differentiable.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit, or the activation is unknown.
        BackendError: the named backend cannot run.
    """
    _check_activation(activation)
    _check_tensor("x", x, x, 3, "(batch, D, L)")
    _check_filter(x, weight, bias)
    if initial_state is not None:
        _check_shape("initial_state", initial_state, x, (*x.shape[:2], weight.shape[1] - 1))
    chosen = choose_backend(x.device.type, x.dtype, backend=backend)
    if chosen == "reference":
        out = _causal_conv1d_ref.causal_conv1d(x, weight, bias, initial_state, activation)
    else:
        weight, bias, state = weight.float(), None if bias is None else bias.float(), initial_state
        rows = _causal_conv1d_cpu.dtype_of_rows(x, state) if chosen == "cpp" else x.dtype
        if state is not None:
            state = state.to(rows if chosen == "cpp" else torch.float32)
        out = causal_conv1d_op(x.to(rows), weight, bias, state, activation == "silu", chosen)
        out = out if out.dtype == x.dtype else out.to(x.dtype)
    return (out, _last_inputs(x, initial_state, weight.shape[1] - 1)) if return_last_state else out


def _last_inputs(x: Tensor, before: Tensor | None, count: int) -> Tensor:
    """The last ``count`` inputs of x (batch, D, L) with ``before`` (batch, D, count), or zeros, in front of it."""
    length = x.shape[-1]
    if length >= count:
        return x[..., length - count :].clone(memory_format=torch.contiguous_format)
    before = x.new_zeros((*x.shape[:2], count)) if before is None else before.to(x.dtype)
    return torch.cat([before[..., length:], x], -1)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """One step of :func:`causal_conv1d`: takes the input x into ``conv_state``, in place, and returns the output.

    Args:
        x: (batch, D).
        conv_state: (batch, D, width - 1) or (batch, D, width), the last inputs, oldest first; written in place.  With one
            more than the step needs, the oldest is dropped unread.
        weight, bias, activation: as in :func:`causal_conv1d`.

    Returns:
        (batch, D) in x's dtype, differentiable.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit, or the activation is unknown.
    """
    _check_activation(activation)
    _check_tensor("x", x, x, 2, "(batch, D)")
    _check_filter(x, weight, bias)
    width = weight.shape[1]
    _check_tensor("conv_state", conv_state, x, 3, f"(batch, D, {width - 1}) or (batch, D, {width})")
    held = width if conv_state.shape[-1] == width else width - 1
    _check_shape("conv_state", conv_state, x, (*x.shape, held))
    out, state = _causal_conv1d_ref.causal_conv1d_update(x, conv_state, weight, bias, activation)
    conv_state.copy_(state)
    return out


# Of (device type, dtype): Triton on a GPU, C++ on a CPU, else the reference.
choose_backend = chooser(
    "causal_conv1d",
    lambda device, dtype: compiled_first(
        device, lambda: _triton_why_not(device, dtype), lambda: _cpp.why_not_for(device, dtype)
    ),
)


def _triton_why_not(device: str, dtype: torch.dtype) -> str | None:
    from compressm.kernels import _causal_conv1d_triton

    return _causal_conv1d_triton.why_not(device, dtype)


def _backend(name: str):
    if name == "cpp":
        return _causal_conv1d_cpu
    from compressm.kernels import _causal_conv1d_triton

    return _causal_conv1d_triton


@custom_op("compressm::causal_conv1d", differentiable=in_cpp)
def causal_conv1d_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, silu: bool, backend: str
) -> Tensor:
    """causal_conv1d on a compiled backend, ``"cpp"`` or ``"triton"``; weight and bias are float32.

    The state is float32 on Triton, on C++ as x: float32, or bfloat16 where x's channels lie next to each other.
    """
    return _backend(backend).forward(x, weight, bias, initial_state, silu)


@causal_conv1d_op.register_fake
def _(x, weight, bias, initial_state, silu, backend):
    return _backend(backend).empty_like_output(x)


@custom_op("compressm::causal_conv1d_backward")
def causal_conv1d_backward_op(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias, initial_state); empty for an argument that was None."""
    return _backend(backend).backward(grad_out, x, weight, bias, initial_state, silu)


@causal_conv1d_backward_op.register_fake
def _(grad_out, x, weight, bias, initial_state, silu, backend):
    return (
        _backend(backend).empty_like_output(x),
        weight.new_empty(weight.shape),
        weight.new_empty((0,) if bias is None else bias.shape),
        weight.new_empty((0,)) if initial_state is None else initial_state.new_empty(initial_state.shape),
    )


def _setup_context(ctx, inputs, output):
    *tensors, silu, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = (silu, backend)


def _backward(ctx, grad_out):
    tensors = ctx.saved_tensors
    grads = causal_conv1d_backward_op(grad_out, *tensors, *ctx.settings)
    return (*(None if t is None else grad for t, grad in zip(tensors, grads, strict=True)), None, None)


causal_conv1d_op.register_autograd(_backward, _setup_context)


def _check_activation(activation: str | None) -> None:
    if activation not in ("silu", None):
        raise bad_argument("activation", got=repr(activation), expected="'silu' or None")


def _check_tensor(name: str, tensor: Tensor, x: Tensor, axes: int, shape: str) -> None:
    if tensor.dim() != axes or not tensor.is_floating_point():
        raise bad_argument(name, got=f"{tuple(tensor.shape)} of {tensor.dtype}", expected=f"a real tensor {shape}")
    if tensor.device != x.device:
        raise bad_argument(name, got=f"device {tensor.device}", expected=f"{x.device}, where x is")


def _check_shape(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    _check_tensor(name, tensor, x, len(shape), str(shape))
    if tensor.shape != shape:
        raise bad_argument(name, got=f"shape {tuple(tensor.shape)}", expected=f"shape {shape}")


def _check_filter(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    channels = x.shape[1]
    _check_tensor("weight", weight, x, 2, "(D, width)")
    if weight.shape[0] != channels or not 1 <= weight.shape[1] <= MAX_WIDTH:
        expected = f"shape ({channels}, width), as x has {channels} channels, width 1 to {MAX_WIDTH}"
        raise bad_argument("weight", got=f"shape {tuple(weight.shape)}", expected=expected)
    if bias is not None:
        _check_shape("bias", bias, x, (channels,))
