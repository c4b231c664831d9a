"""What can be tuned: every Triton kernel of every op."""

from __future__ import annotations

import functools

from compressm.kernels.core.gpu import Tunable
from gpu.checks import ops


@functools.cache
def tunables() -> tuple[Tunable, ...]:
    """Of all ops."""
    return tuple(tunable for op in ops().values() for tunable in op.gpu_cases().tunables())
