"""The pointwise parts of a residual block, each with its dropout in one pass: GELU, and the gated linear unit added to x.

A narrow linear layer in front of the gate is part of its pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels.core import cpp
from compressm.kernels.core.custom_op import custom_op
from compressm.kernels.core.dispatch import chooser, cpp_or_reference
from compressm.kernels.fused_cpu import gates_reference

NARROW = 8  # kNarrow in csrc/fused_cpu/gates.h
_OPS = ("gelu_dropout", "glu_dropout_add", "linear_glu_dropout_add")
choose_backend = {op: chooser(op, cpp_or_reference) for op in _OPS}


def gelu_dropout(x: Tensor, p: float, training: bool = True, *, backend: str | None = None) -> Tensor:
    """dropout(gelu(x)) with the exact GELU, x P(Z < x) for a standard normal Z.

    On a CPU the mask is a function of one seed and of the element's index: nothing but x and the seed is kept for the
    backward.  The seed is drawn from torch's default generator, which ``torch.manual_seed`` governs; a call that drops
    nothing draws none.

    Args:
        x: any shape, float32, bfloat16 or float16 (float64 on the reference); read in place where it is contiguous.
        p: probability, elementwise, that an element is zero; on a CPU to within 2^-17.  The others are divided by 1 - p.
        training: False drops nothing.
        backend: ``"cpp"`` or ``"reference"``; None chooses.  Both draw the same masks on a CPU; on other devices the
            reference is torch's own GELU and dropout.

    Returns:
        x's shape and dtype; computed in float32 by the C++ kernels.  Differentiable.

    Raises:
        ArgumentError: x is not a real floating-point tensor, or p not a probability.
        BackendError: the named backend cannot run.
    """
    _check_tensor("x", x)
    p = _probability(p, training)
    chosen = choose_backend["gelu_dropout"](x.device.type, x.dtype, backend=backend)
    seed = draw_seed(x, p)
    if chosen == "reference":
        return gates_reference.gelu_dropout(x, seed, p)
    return gelu_dropout_op(x.float(), seed, p).to(x.dtype)


def glu_dropout_add(
    pre: Tensor, residual: Tensor, p: float, training: bool = True, *, backend: str | None = None
) -> Tensor:
    """residual + dropout(a sigmoid(b)), where a and b are the halves of ``pre``.

    Args:
        pre: (..., 2H), [a | b]; float32, bfloat16 or float16 (float64 on the reference); read in place where it is contiguous.
        residual: (..., H).
        p, training, backend: as in :func:`gelu_dropout`.

    Returns:
        (..., H) in the dtype to which torch promotes the two.  Differentiable; the backward keeps ``pre`` and the seed.

    Raises:
        ArgumentError: a tensor is not real floating point, shapes or devices do not fit, or p is not a probability.
        BackendError: the named backend cannot run.
    """
    _check_tensor("pre", pre)
    _check_tensor("residual", residual)
    if pre.dim() == 0 or pre.shape[-1] % 2:
        raise bad_argument("pre", got=f"shape {tuple(pre.shape)}", expected="(..., 2H), two halves")
    shape = (*pre.shape[:-1], pre.shape[-1] // 2)
    if tuple(residual.shape) != shape:
        raise bad_argument("residual", got=f"shape {tuple(residual.shape)}", expected=f"shape {shape}, that of half of pre")
    if residual.device != pre.device:
        raise bad_argument("residual", got=f"device {residual.device}", expected=f"{pre.device}, where pre is")
    p = _probability(p, training)
    dtype = torch.promote_types(pre.dtype, residual.dtype)
    chosen = choose_backend["glu_dropout_add"](pre.device.type, dtype, backend=backend)
    seed = draw_seed(pre, p)
    if chosen == "reference":
        return gates_reference.glu_dropout_add(pre, residual, seed, p)
    return glu_dropout_add_op(pre.float(), residual.float(), seed, p).to(dtype)


def linear_glu_dropout_add(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    p: float,
    training: bool = True,
    *,
    backend: str | None = None,
) -> Tensor:
    """residual + dropout(a sigmoid(b)) with x weight^T + bias = [a | b]: ``glu_dropout_add(linear(x, weight, bias), ...)``.

    Up to 8 inputs and channels the C++ kernels take the product into the same pass, and make it again in the backward;
    wider layers run torch's product and :func:`glu_dropout_add`.

    Args:
        x: (..., K), float32, bfloat16 or float16 (float64 on the reference).
        weight: (2H, K).
        bias: (2H,), or None.
        residual: (..., H).
        p, training, backend: as in :func:`gelu_dropout`.

    Returns:
        (..., H) in the dtype to which torch promotes x and residual.  Differentiable.  The mask is that of
        :func:`glu_dropout_add`.

    Raises:
        ArgumentError: a tensor is not real floating point, shapes or devices do not fit, or p is not a probability.
        BackendError: the named backend cannot run.
    """
    _check_linear(x, weight, bias, residual)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    chosen = choose_backend["linear_glu_dropout_add"](x.device.type, dtype, backend=backend)
    narrow = all(0 < size <= NARROW for size in (weight.shape[1], weight.shape[0] // 2))
    if chosen == "cpp" and not narrow:
        return glu_dropout_add(torch.nn.functional.linear(x, weight, bias), residual, p, training, backend=backend).to(dtype)
    p = _probability(p, training)
    seed = draw_seed(x, p)
    if chosen == "reference":
        return gates_reference.linear_glu_dropout_add(x, weight, bias, residual, seed, p).to(dtype)
    bias = weight.new_zeros(weight.shape[:1]) if bias is None else bias
    return gated_linear_op(x.float(), weight.float(), bias.float(), residual.float(), seed, p).to(dtype)


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is None:
            continue
        _check_tensor(name, tensor)
        if tensor.device != x.device:
            raise bad_argument(name, got=f"device {tensor.device}", expected=f"{x.device}, where x is")
    if x.dim() == 0:
        raise bad_argument("x", got="a number", expected="(..., K)")
    if weight.dim() != 2 or weight.shape[0] % 2 or weight.shape[1] != x.shape[-1]:
        raise bad_argument("weight", got=f"shape {tuple(weight.shape)}", expected=f"(2H, {x.shape[-1]}), two halves")
    shape = (*x.shape[:-1], weight.shape[0] // 2)
    for name, tensor, expected in (("bias", bias, weight.shape[:1]), ("residual", residual, shape)):
        if tensor is not None and tuple(tensor.shape) != tuple(expected):
            raise bad_argument(name, got=f"shape {tuple(tensor.shape)}", expected=f"shape {tuple(expected)}")


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise bad_argument(name, got=str(tensor.dtype), expected="a real floating-point tensor")


def _probability(p: float, training: bool) -> float:
    """p of this call, 0 where it drops nothing."""
    if not 0 <= p <= 1:
        raise bad_argument("p", got=p, expected="a probability, 0 to 1")
    return float(p) if training else 0.0


def draw_seed(like: Tensor, p: float) -> Tensor | None:
    """The key of a mask: 63 bits from torch's default generator.  None where the kernels make no mask."""
    return torch.randint(2**63 - 1, (), device="cpu") if p > 0 and like.device.type == "cpu" else None


@custom_op("compressm::gelu_dropout", differentiable=True)
def gelu_dropout_op(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """gelu_dropout by the C++ kernels, float32; seed () int64, None for p = 0."""
    return cpp.library().gelu_dropout(x, seed, p)


@gelu_dropout_op.register_fake
def _(x, seed, p):
    return x.new_empty(x.shape)


@custom_op("compressm::gelu_dropout_backward")
def gelu_dropout_backward_op(grad_out: Tensor, x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """Gradient of x."""
    return cpp.library().gelu_dropout_backward(grad_out, x, seed, p)


@gelu_dropout_backward_op.register_fake
def _(grad_out, x, seed, p):
    return x.new_empty(x.shape)


def _gelu_setup_context(ctx, inputs, output):
    x, seed, ctx.p = inputs
    ctx.save_for_backward(x, seed)


def _gelu_backward(ctx, grad_out):
    return gelu_dropout_backward_op(grad_out, *ctx.saved_tensors, ctx.p), None, None


gelu_dropout_op.register_autograd(_gelu_backward, _gelu_setup_context)


@custom_op("compressm::glu_dropout_add", differentiable=True)
def glu_dropout_add_op(pre: Tensor, residual: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """glu_dropout_add by the C++ kernels, float32; seed () int64, None for p = 0."""
    return cpp.library().glu_dropout_add(pre, residual, seed, p)


@glu_dropout_add_op.register_fake
def _(pre, residual, seed, p):
    return residual.new_empty(residual.shape)


@custom_op("compressm::glu_dropout_add_backward")
def glu_dropout_add_backward_op(grad_out: Tensor, pre: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """Gradient of pre; that of residual is grad_out."""
    return cpp.library().glu_dropout_add_backward(grad_out, pre, seed, p)


@glu_dropout_add_backward_op.register_fake
def _(grad_out, pre, seed, p):
    return pre.new_empty(pre.shape)


def _glu_setup_context(ctx, inputs, output):
    pre, _residual, seed, ctx.p = inputs
    ctx.save_for_backward(pre, seed)


def _glu_backward(ctx, grad_out):
    pre, seed = ctx.saved_tensors
    grad_pre = glu_dropout_add_backward_op(grad_out, pre, seed, ctx.p) if ctx.needs_input_grad[0] else None
    return grad_pre, grad_out, None, None


glu_dropout_add_op.register_autograd(_glu_backward, _glu_setup_context)


@custom_op("compressm::gated_linear", differentiable=True)
def gated_linear_op(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, seed: Tensor | None, p: float
) -> Tensor:
    """linear_glu_dropout_add by the C++ kernels, float32, narrow; seed () int64, None for p = 0."""
    return cpp.library().gated_linear(x, weight, bias, residual, seed, p)


@gated_linear_op.register_fake
def _(x, weight, bias, residual, seed, p):
    return residual.new_empty(residual.shape)


@custom_op("compressm::gated_linear_backward")
def gated_linear_backward_op(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, seed: Tensor | None, p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; that of residual is grad_out."""
    return cpp.library().gated_linear_backward(grad_out, x, weight, bias, seed, p)


@gated_linear_backward_op.register_fake
def _(grad_out, x, weight, bias, seed, p):
    return tuple(t.new_empty(t.shape) for t in (x, weight, bias))


def _linear_setup_context(ctx, inputs, output):
    x, weight, bias, _residual, seed, ctx.p = inputs
    ctx.save_for_backward(x, weight, bias, seed)


def _linear_backward(ctx, grad_out):
    x, weight, bias, seed = ctx.saved_tensors
    grads = gated_linear_backward_op(grad_out, x, weight, bias, seed, ctx.p)
    return *grads, grad_out, None, None


gated_linear_op.register_autograd(_linear_backward, _linear_setup_context)
