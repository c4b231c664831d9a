"""The C++ backend of the selective scan and of its decode step (``csrc/selective_scan/selective_scan.cpp``)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from compressm.kernels.core import cpp
from compressm.kernels.core.plan import KernelPlan

STEPS = 32  # between two saved states; kScanTile in csrc/selective_scan/selective_scan.h


def why_not(device: str, dtype: torch.dtype, constant: bool) -> str | None:
    """None if the C++ kernels run for tensors of this device type and dtype, else the reason.

    Args:
        device: device type of the tensors; dtype: the one they promote to.
        constant: B or C has no time axis.
    """
    if constant and device == "cpu" and dtype != torch.float64:
        return "the C++ kernels take B and C that depend on time; constant ones run on the reference"
    return cpp.why_not_for(device, dtype)


@functools.lru_cache(maxsize=4096)
def plan(batch: int, channels: int, length: int, states: int) -> KernelPlan:
    """The plan for an input (batch, channels, length); the kernels have one form for all shapes."""
    return KernelPlan("selective_scan", "cpp", "scan", (("steps", STEPS),), "vectors of channels, a tile of steps at a time")


def dtype_of_rows(*rows: Tensor | None) -> torch.dtype:
    """In which the kernels take u, delta and z: bfloat16 where all are, with channels next to each other, else float32."""
    native = all(t is None or (t.dtype == torch.bfloat16 and t.stride(1) == 1) for t in rows)
    return torch.bfloat16 if native else torch.float32


def checkpoint_shape(
    batch: int, channels: int, length: int, states: int, packed: bool, sequences: int
) -> tuple[int, int, int]:
    """Shape of the states (tiles, N, D) that the forward keeps, one in front of each tile of steps.

    Args:
        packed: ``sequences`` of any length follow one another; each may end with an incomplete tile.
    """
    tiles = length // STEPS + sequences if packed else batch * -(-length // STEPS)
    return tiles, states, channels


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    train: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, last state, checkpoints, output in front of the gate), the first two differentiable; see ``selective_scan_op``."""
    return cpp.library().selective_scan(
        u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, train
    )


def backward(
    grad_out: Tensor,
    grad_last: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    y: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor, ...]:
    """The nine gradients; see ``selective_scan_backward_op``.  The same bits for any number of threads."""
    return cpp.library().selective_scan_backward(
        grad_out, grad_last, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, checkpoints, y, delta_softplus
    )


def state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_batch_indices: Tensor | None,
    dst_state_batch_indices: Tensor | None,
    dt_softplus: bool,
    pad_slot_id: int,
) -> Tensor:
    """One step, the picked rows of ``state`` in place; see ``selective_state_update_op``."""
    return cpp.library().selective_step(
        state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, dst_state_batch_indices, dt_softplus, pad_slot_id
    )
