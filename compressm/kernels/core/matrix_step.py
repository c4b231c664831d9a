"""The plan of a decode step of matrix-valued states, whose heads share queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from compressm.errors import bad_argument
from compressm.kernels.core.op import Plan
from compressm.kernels.core.plan import KernelPlan

SHAPES = {"state": "(batch, HV, K, V)", "k": "(batch, H, K)"}


def planner(op: str, choose_backend: Callable[..., str]) -> Plan:
    """The plan of an op whose record has these ``shapes``.

    Args:
        op: its name.
        choose_backend: of (device type, dtype, whether an argument requires a gradient).
    """

    def plan(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: str, backend: str | None) -> KernelPlan:
        (rows, heads, keys, _), (batch, shared, channels) = shapes["state"], shapes["k"]
        if (rows, keys) != (batch, channels) or shared == 0 or heads % shared:
            expected = "state (batch, HV, K, V) and k (batch, H, K), H dividing HV"
            raise bad_argument("shapes", got=dict(shapes), expected=expected)
        return KernelPlan(op, choose_backend(device, dtype, False, backend=backend), "step")

    return plan
