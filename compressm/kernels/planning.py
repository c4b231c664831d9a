"""Which kernel would run: a pure function of shapes, dtype and device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compressm.errors import bad_argument
from compressm.kernels._plan import KernelPlan
from compressm.kernels.gramians import choose_backend as choose_gramians_backend
from compressm.kernels.lti_scan import plan_for_shapes
from compressm.kernels.selective_scan import plan_for_shapes as plan_selective_scan

_ARGUMENTS = {"lti_scan": {"u": 3, "B": 2, "C": 2}, "gramians": {"B": 2, "C": 2}, "selective_scan": {"u": 3, "A": 2}}


def plan(
    op: str,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> KernelPlan:
    """The plan that an op follows; runs nothing but the first C++ build.

    Args:
        op: ``"lti_scan"``, ``"gramians"`` or ``"selective_scan"``.
        shapes: of the op's arguments by name: ``{"u": (batch, L, H), "B": (N, H), "C": (H_out, N)}``; gramians has no u;
            ``{"u": (batch, D, L), "A": (D, N)}`` for selective_scan.
        dtype: of u; Gramians are computed in float64 whatever it is.
        device: of the arguments.
        backend: as the op takes it.

    Raises:
        ArgumentError: unknown op, or shapes that are missing or do not fit.
        BackendError: the named backend cannot run.
    """
    if op not in _ARGUMENTS:
        raise bad_argument("op", got=repr(op), expected=f"one of {', '.join(_ARGUMENTS)}")
    for name, rank in _ARGUMENTS[op].items():
        if len(shapes.get(name, ())) != rank:
            raise bad_argument("shapes", got=f"{name}: {shapes.get(name)}", expected=f"a shape of {rank} axes for {name}")
    kind = torch.device(device).type
    if op == "gramians":
        return KernelPlan("gramians", choose_gramians_backend(kind, False, backend), "closed form")
    if op == "selective_scan":
        (batch, channels, length), (rows, states) = shapes["u"], shapes["A"]
        if rows != channels:
            raise bad_argument("shapes", got=dict(shapes), expected="u (batch, D, L) and A (D, N)")
        return plan_selective_scan(kind, dtype, batch, channels, length, states, False, backend)
    (batch, length, channels), (states, _), (outputs, _) = shapes["u"], shapes["B"], shapes["C"]
    if shapes["B"][1] != channels or shapes["C"][1] != states:
        raise bad_argument("shapes", got=dict(shapes), expected="u (batch, L, H), B (N, H) and C (H_out, N)")
    return plan_for_shapes(kind, dtype, batch, length, channels, outputs, states, backend)
