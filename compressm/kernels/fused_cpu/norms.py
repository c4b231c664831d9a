"""Layer and RMS normalisation over the last axis, fast on CPU where rows are short."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels.core import cpp
from compressm.kernels.core.custom_op import custom_op
from compressm.kernels.core.dispatch import chooser, cpp_or_reference
from compressm.kernels.fused_cpu import norms_reference

_OPS = ("layer_norm", "layer_norm_mean", "rms_norm")
choose_backend = {op: chooser(op, cpp_or_reference) for op in _OPS}


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, backend: str | None = None
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, as ``torch.nn.functional.layer_norm``.

    The backward computes mean and variance again, so that only x and weight are kept for it.

    Args:
        x: (..., H), float32, bfloat16 or float16 (float64 on the reference); any strides.
        weight: (H,), any real dtype.
        bias: (H,), or None.
        eps: added to the variance.
        backend: ``"cpp"`` or ``"reference"``, which is torch's own; None chooses.

    Returns:
        (..., H) in x's dtype.  x, weight and bias are differentiable.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit.
        BackendError: the named backend cannot run.
    """
    _check(x, weight, bias)
    return _normalise("layer_norm", x, weight, bias, eps, True, backend)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, backend: str | None = None) -> Tensor:
    """x / sqrt(mean square + eps) * weight over the last axis, as ``torch.nn.functional.rms_norm``.

    Arguments, result and errors as in :func:`layer_norm`.
    """
    _check(x, weight, None)
    return _normalise("rms_norm", x, weight, None, eps, False, backend)


def layer_norm_mean(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, backend: str | None = None
) -> Tensor:
    """``layer_norm(x, weight, bias, eps).mean(-2)``: the mean over time of normalised states, of which none is stored.

    Args:
        x: (..., L, H), as in :func:`layer_norm`.
        weight, bias, eps, backend: as in :func:`layer_norm`.

    Returns:
        (..., H) in x's dtype.  x, weight and bias are differentiable.

    Raises:
        as :func:`layer_norm`.
    """
    _check(x, weight, bias)
    if x.dim() < 2:
        raise bad_argument("x", got=f"shape {tuple(x.shape)}", expected="(..., L, H)")
    if choose_backend["layer_norm_mean"](x.device.type, x.dtype, backend=backend) == "reference":
        return norms_reference.norm(x, weight, bias, eps, True).mean(-2)
    bias = None if bias is None else bias.float()
    rows = x.float() if x.dim() == 3 else x.float().reshape(-1, *x.shape[-2:])
    out = norm_mean_op(rows, weight.float(), bias, float(eps), True).to(x.dtype)
    return out if x.dim() == 3 else out.reshape(*x.shape[:-2], x.shape[-1])


def _normalise(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool, backend: str | None
) -> Tensor:
    if choose_backend[op](x.device.type, x.dtype, backend=backend) == "reference":
        return norms_reference.norm(x, weight, bias, eps, centred)
    bias = None if bias is None else bias.float()
    return norm_op(x.float(), weight.float(), bias, float(eps), centred).to(x.dtype)


@custom_op("compressm::norm", differentiable=True)
def norm_op(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
    """A layer norm, or an RMS norm unless ``centred``, by the C++ kernels; x (..., H), weight and bias (H,) are float32."""
    return cpp.library().norm(x, weight, bias, eps, centred)


@norm_op.register_fake
def _(x, weight, bias, eps, centred):
    return x.new_empty(x.shape)


@custom_op("compressm::norm_backward")
def norm_backward_op(
    grad_out: Tensor, x: Tensor, weight: Tensor, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias); the last is empty unless ``centred``."""
    return cpp.library().norm_backward(grad_out, x, weight, eps, centred)


def _fake_gradients(grad_out, x, weight, eps, centred):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape if centred else (0,))


norm_backward_op.register_fake(_fake_gradients)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.eps, ctx.centred = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(backward_op, ctx, grad_out):
    grad_x, grad_weight, grad_bias = backward_op(grad_out, *ctx.saved_tensors, ctx.eps, ctx.centred)
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None, None


norm_op.register_autograd(partial(_backward, norm_backward_op), _setup_context)


@custom_op("compressm::norm_mean", differentiable=True)
def norm_mean_op(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
    """The mean over L of :func:`norm_op`'s output for x (batch, L, H): (batch, H)."""
    return cpp.library().norm_mean(x, weight, bias, eps, centred)


@norm_mean_op.register_fake
def _(x, weight, bias, eps, centred):
    return x.new_empty((x.shape[0], x.shape[2]))


@custom_op("compressm::norm_mean_backward")
def norm_mean_backward_op(
    grad_out: Tensor, x: Tensor, weight: Tensor, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias); the last is empty unless ``centred``."""
    return cpp.library().norm_mean_backward(grad_out, x, weight, eps, centred)


norm_mean_backward_op.register_fake(_fake_gradients)
norm_mean_op.register_autograd(partial(_backward, norm_mean_backward_op), _setup_context)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() == 0 or not x.is_floating_point():
        raise bad_argument("x", got=f"{tuple(x.shape)} of {x.dtype}", expected="a real tensor (..., H)")
    _check_channels("weight", weight, x)
    if bias is not None:
        _check_channels("bias", bias, x)


def _check_channels(name: str, tensor: Tensor, x: Tensor) -> None:
    if tuple(tensor.shape) != (x.shape[-1],) or not tensor.is_floating_point():
        expected = f"a real tensor ({x.shape[-1]},), as x has {x.shape[-1]} channels"
        raise bad_argument(name, got=f"{tuple(tensor.shape)} of {tensor.dtype}", expected=expected)
    if tensor.device != x.device:
        raise bad_argument(name, got=f"device {tensor.device}", expected=f"{x.device}, where x is")
