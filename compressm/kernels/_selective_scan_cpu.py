"""The C++ backend of the selective scan and of its decode step (``csrc/selective_scan.cpp``)."""

from __future__ import annotations

import torch


def why_not(device: str, dtype: torch.dtype, constant: bool) -> str | None:
    """None if the C++ kernels run for tensors of this device type and dtype, else the reason."""
    return "the C++ kernels hold no selective scan"
