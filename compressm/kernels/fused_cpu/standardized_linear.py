"""The first layer of a model that reads raw numbers: standardisation and a linear layer of few inputs in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels.core import cpp
from compressm.kernels.core.custom_op import custom_op
from compressm.kernels.core.dispatch import chooser, cpp_or_reference
from compressm.kernels.fused_cpu import standardized_linear_reference

MAX_INPUTS = 8  # kMaxInputs in csrc/fused_cpu/standardized_linear.cpp
choose_backend = chooser("standardized_linear", cpp_or_reference)


def standardized_linear(
    x: Tensor, mean: Tensor, std: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """((x - mean) / std) weight^T + bias of data x, which get no gradient: pixels, samples, sensor readings.

    Bytes are read as they are; what is kept for the backward is x itself.

    Args:
        x: (..., K) of any real dtype.
        mean, std: (K,), of the data; no gradient.
        weight: (H, K); bias: (H,), or None.
        backend: ``"cpp"`` or ``"reference"``, which is torch's own; None chooses.  More than 8 inputs, parameters that are
            not float32 and autocast run torch's operations in either case.

    Returns:
        (..., H) in the parameters' dtype, or as autocast says.  weight and bias are differentiable.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit, or x, mean or std asks for a gradient.
        BackendError: the named backend cannot run.
    """
    _check(x, mean, std, weight, bias)
    chosen = choose_backend(x.device.type, weight.dtype, backend=backend)
    narrow = 0 < x.shape[-1] <= MAX_INPUTS and weight.shape[0] > 0
    if chosen == "reference" or not narrow or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return standardized_linear_reference.standardized_linear(x, mean, std, weight, bias)
    x = x if x.dtype in (torch.uint8, torch.float32) else x.float()
    return standardized_linear_op(x, mean, std, weight, bias)


@custom_op("compressm::standardized_linear", differentiable=True)
def standardized_linear_op(x: Tensor, mean: Tensor, std: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By the C++ kernel; x uint8 or float32, the others float32."""
    return cpp.library().standardized_linear(x, mean, std, weight, bias)


@standardized_linear_op.register_fake
def _(x, mean, std, weight, bias):
    return weight.new_empty((*x.shape[:-1], weight.shape[0]))


@custom_op("compressm::standardized_linear_backward")
def standardized_linear_backward_op(
    grad_out: Tensor, x: Tensor, mean: Tensor, std: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of (weight, bias)."""
    return cpp.library().standardized_linear_backward(grad_out, x, mean, std, weight)


@standardized_linear_backward_op.register_fake
def _(grad_out, x, mean, std, weight):
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


def _setup_context(ctx, inputs, output):
    *kept, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(*kept)


def _backward(ctx, grad_out):
    grad_weight, grad_bias = standardized_linear_backward_op(grad_out, *ctx.saved_tensors)
    return None, None, None, grad_weight, grad_bias if ctx.has_bias else None


standardized_linear_op.register_autograd(_backward, _setup_context)


def _check(x: Tensor, mean: Tensor, std: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() == 0 or x.is_complex():
        raise bad_argument("x", got=f"{tuple(x.shape)} of {x.dtype}", expected="a real tensor (..., K)")
    inputs = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != inputs:
        raise bad_argument("weight", got=f"shape {tuple(weight.shape)}", expected=f"(H, {inputs}), as x has {inputs} channels")
    for name, tensor, shape in (("mean", mean, (inputs,)), ("std", std, (inputs,)), ("bias", bias, weight.shape[:1])):
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise bad_argument(name, got=f"shape {tuple(tensor.shape)}", expected=f"{tuple(shape)}")
    for name, tensor in (("mean", mean), ("std", std), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != weight.dtype or not tensor.is_floating_point():
            raise bad_argument(name, got=str(tensor.dtype), expected=f"{weight.dtype}, one real dtype for all parameters")
        if tensor.device != x.device:
            raise bad_argument(name, got=f"device {tensor.device}", expected=f"{x.device}, where x is")
    for name, tensor in (("x", x), ("mean", mean), ("std", std)):
        if tensor.requires_grad:
            raise bad_argument(name, got="a tensor that asks for a gradient", expected="data", remedy="Detach it.")
