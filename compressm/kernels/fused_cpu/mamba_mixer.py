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

PIECE_STEPS = 512  # of all sequences that a thread takes at once, at least


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
    """The mixer of :class:`compressm.layers.Mamba` in eager mode on the CPU, with its gradient; None where it should not run.

    It computes what the layer's separate steps do, each thread a few sequences through all of them.  It does not run for
    anything but float32, under autocast, where another backend is chosen, while something traces, and where the separate steps
    are faster, see :func:`pieces_of`.

    Args:
        hidden: (batch, L, d_model); the parameters as the layer's.

    Returns:
        (batch, L, d_model).

    Raises:
        ArgumentError: A_log is not finite, or too large.
    """
    arguments = (
        hidden, in_weight, in_bias, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A_log, D, out_weight, out_bias
    )  # fmt: skip
    if torch.is_autocast_enabled("cpu") or not all(map(_narrow, arguments)):
        return None
    parameters = in_weight.numel() + x_weight.numel() + dt_weight.numel() + out_weight.numel()
    pieces = pieces_of(hidden.shape[0], hidden.shape[1], A_log.shape[0], parameters, torch.get_num_threads())
    if pieces == 0 or not plain_call(*arguments):
        return None
    scan, width = backend_of_scan("cpu", torch.float32, False), conv_weight.shape[-1]
    if not scan == backend_of_convolution("cpu", torch.float32, width > MAX_WIDTH, False) == "cpp":
        return None
    try:
        return cpp.library().mamba_mixer(*arguments, pieces, torch.is_grad_enabled())[0]
    except ValueError as error:  # of the values of A_log, which the op looks at on its way
        raise ArgumentError(str(error)) from error


def _narrow(t: Tensor | None) -> bool:
    return t is None or (t.dtype == torch.float32 and t.device.type == "cpu")


def pieces_of(batch: int, length: int, channels: int, parameters: int, threads: int) -> int:
    """How many pieces of whole sequences a batch is cut into; 0: the threads had better share each step.

    So it is where there are fewer pieces than threads, and where the pieces' partial gradients, one for each of the parameters,
    would be more numbers than one of the scan's inputs has.
    """
    steps = batch * length
    pieces = min(batch, max(steps // PIECE_STEPS, 1))
    return pieces if threads <= pieces and pieces * parameters <= steps * channels else 0
