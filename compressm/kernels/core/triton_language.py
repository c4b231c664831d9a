"""Triton where it is installed, and stand-ins that let the kernel modules load and say why they cannot run where it is not."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

WARP = 64 if torch.version.hip else 32  # lanes

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:
    triton = tl = None

    def jit(fn: Any = None, **_: Any) -> Any:
        """Leave a kernel as it is: without Triton nothing can launch it."""
        return (lambda kernel: kernel) if fn is None else fn


def why_not(device: str, kernel: Any) -> str | None:
    """None if ``kernel`` runs on tensors of this device type, else the reason.

    On CPU tensors a kernel runs only in Triton's interpreter, which wraps it in place of the compiler when it is on.
    """
    if triton is None:
        return "Triton is not installed"
    if device == "cpu" and isinstance(kernel, triton.JITFunction):
        return "Triton kernels run on a GPU (on CPU tensors only in Triton's interpreter)"
    if device not in ("cpu", "cuda"):
        return f"Triton kernels run on CUDA and ROCm GPUs, not on {device}"
    return None


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's GPU the current one, where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
