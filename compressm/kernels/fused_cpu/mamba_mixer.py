"""A whole Mamba-1 mixer as one op of the C++ library (``csrc/fused_cpu/mamba_mixer.cpp``)."""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.errors import ArgumentError
from compressm.kernels.causal_conv1d.cpu import MAX_WIDTH
from compressm.kernels.causal_conv1d.op import choose_backend as backend_of_convolution
from compressm.kernels.core import cpp
from compressm.kernels.core.custom_op import plain_call
from compressm.kernels.selective_scan.op import choose_backend as backend_of_scan

_NARROW = frozenset({torch.float32, torch.bfloat16})


def mamba_mixer(
    hidden: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
) -> Tensor | None:
    """The mixer of :class:`compressm.layers.Mamba` in eager mode on the CPU, with its gradient; None where it cannot run.

    It computes what the layer's separate steps do, in the same precision: as wide as ``hidden``, or bfloat16 under autocast.
    It cannot run for float16 and float64, without elements, for more taps than the C++ convolution takes, for projections of
    another dtype than ``hidden`` outside autocast, where another backend is chosen, or while something traces.

    Args:
        hidden: (batch, L, d_model); the parameters as the layer's.

    Returns:
        (batch, L, d_model).

    Raises:
        ArgumentError: A_log is not finite, or too large.
    """
    work, allowed = hidden.dtype, {hidden.dtype}
    if work in _NARROW and torch.is_autocast_enabled("cpu"):
        work, allowed = torch.get_autocast_dtype("cpu"), _NARROW
    if work not in _NARROW or hidden.numel() == 0 or A_log.numel() == 0:
        return None
    projections = (in_weight, in_bias, x_weight, dt_weight, out_weight, out_bias)
    if any(t is not None and t.dtype not in allowed for t in projections):
        return None
    arguments = (
        hidden, in_weight, in_bias, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A_log, D, out_weight, out_bias
    )  # fmt: skip
    if not plain_call(*arguments) or not _chosen(hidden.device.type, work, conv_weight.shape[-1] > MAX_WIDTH):
        return None
    try:
        return cpp.library().mamba_mixer(*arguments, work == torch.bfloat16, torch.is_grad_enabled())[0]
    except ValueError as error:  # of the values of A_log, which the op looks at on its way
        raise ArgumentError(str(error)) from error


def _chosen(device: str, dtype: torch.dtype, wide: bool) -> bool:
    """Whether both ops that the mixer is made of would run in C++."""
    scan, convolution = backend_of_scan(device, dtype, False), backend_of_convolution(device, dtype, wide, False)
    return scan == convolution == "cpp"
