"""The cross-entropy of a language model's scores, in one pass forward and one backward."""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels.core import cpp
from compressm.kernels.core.custom_op import custom_op
from compressm.kernels.core.dispatch import chooser, cpp_or_reference
from compressm.kernels.fused_cpu import cross_entropy_reference

REDUCTIONS = ("mean", "sum", "none")
choose_backend = chooser("cross_entropy", cpp_or_reference)


def cross_entropy(
    scores: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean", backend: str | None = None
) -> Tensor:
    """log(sum_j exp(x_j)) - x_target over the last axis, as ``torch.nn.functional.cross_entropy`` of rows.

    The backward computes the softmax again: besides the scores, two numbers a row are kept for it.

    Args:
        scores: (..., V), float32, bfloat16 or float16 (float64 on the reference); any strides.
        targets: (...), int64 classes from 0 to V - 1, or ``ignore_index``.
        ignore_index: target of rows without loss and gradient.
        reduction: ``"mean"`` over the rows that are not ignored (NaN if all are), ``"sum"`` or ``"none"``.
        backend: ``"cpp"`` or ``"reference"``, which is torch's own; None chooses.

    Returns:
        a scalar, or (...) for ``"none"``; float32 (float64 for float64 scores).  scores is differentiable.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit, or the reduction is unknown.
        IndexError: a target that is no class.
        BackendError: the named backend cannot run.
    """
    _check(scores, targets, reduction)
    rows, classes = scores.reshape(-1, scores.shape[-1]), targets.reshape(-1)
    if choose_backend(scores.device.type, scores.dtype, backend=backend) == "reference":
        loss = cross_entropy_reference.cross_entropy(rows, classes, ignore_index, reduction)
    else:
        rows = rows if rows.dtype == torch.bfloat16 else rows.float()
        loss, _normalizers = cross_entropy_op(rows, classes, ignore_index, reduction)
    return loss.reshape(targets.shape) if reduction == "none" else loss


@custom_op("compressm::cross_entropy", differentiable=True)
def cross_entropy_op(scores: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> tuple[Tensor, Tensor]:
    """The losses (rows,), or a scalar, and what the backward needs (rows, 2), float32, by the C++ kernels.

    scores (rows, V) is float32 or bfloat16, targets (rows,) int64.
    """
    return cpp.library().cross_entropy(scores, targets, ignore_index, reduction)


@cross_entropy_op.register_fake
def _(scores, targets, ignore_index, reduction):
    normalizers = scores.new_empty((*targets.shape, 2), dtype=torch.float32)
    return normalizers.new_empty(targets.shape if reduction == "none" else ()), normalizers


@custom_op("compressm::cross_entropy_backward")
def cross_entropy_backward_op(
    grad_loss: Tensor, scores: Tensor, targets: Tensor, normalizers: Tensor, ignore_index: int, reduction: str
) -> Tensor:
    """Gradient of scores."""
    return cpp.library().cross_entropy_backward(grad_loss, scores, targets, normalizers, ignore_index, reduction)


@cross_entropy_backward_op.register_fake
def _(grad_loss, scores, targets, normalizers, ignore_index, reduction):
    return scores.new_empty(scores.shape)


def _setup_context(ctx, inputs, output):
    scores, targets, *ctx.settings = inputs
    ctx.save_for_backward(scores, targets, output[1])


def _backward(ctx, grad_loss, _grad_normalizers):
    return cross_entropy_backward_op(grad_loss, *ctx.saved_tensors, *ctx.settings), None, None, None


cross_entropy_op.register_autograd(_backward, _setup_context)


def _check(scores: Tensor, targets: Tensor, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise bad_argument("reduction", got=repr(reduction), expected=f"one of {', '.join(REDUCTIONS)}")
    if scores.dim() == 0 or scores.shape[-1] == 0 or not scores.is_floating_point():
        got = f"{tuple(scores.shape)} of {scores.dtype}"
        raise bad_argument("scores", got=got, expected="a real tensor (..., V) with at least one class")
    if targets.shape != scores.shape[:-1] or targets.dtype != torch.int64:
        expected = f"int64 of shape {tuple(scores.shape[:-1])}, a class for every row of scores"
        raise bad_argument("targets", got=f"{tuple(targets.shape)} of {targets.dtype}", expected=expected)
    if targets.device != scores.device:
        raise bad_argument("targets", got=f"device {targets.device}", expected=f"{scores.device}, where scores is")
