"""The record of the Gramians."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compressm.errors import bad_argument
from compressm.kernels.core.op import Cost, Op, Sample
from compressm.kernels.core.plan import KernelPlan
from compressm.kernels.gramians.op import choose_backend, gramians


def draw(sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> Sample:
    """``batch`` systems of one shape, in float64 whatever the dtype."""
    batch, states, channels = (sizes[name] for name in ("batch", "states", "channels"))
    decay = -0.1 * torch.rand(batch, states, device=device, dtype=torch.float64) - 1e-4
    tensors = {
        "log_lam": torch.complex(decay, 6 * torch.rand(batch, states, device=device, dtype=torch.float64)),
        "B": torch.randn(batch, states, channels, device=device, dtype=torch.complex128),
        "C": torch.randn(batch, channels, states, device=device, dtype=torch.complex128),
    }
    return Sample(tensors, {}, {"batch": dict.fromkeys((*tensors, "P", "S", "Q", "S_Q"), 0)})


def cost(sizes: Mapping[str, int], word: int, backward: bool) -> Cost:
    """Four complex matrices of N x N from real products; the quotients need no exponentials to speak of."""
    batch, states, channels = (sizes[name] for name in ("batch", "states", "channels"))
    moved = 16 * batch * (4 * states**2 + 2 * states * channels + states)
    return Cost(moved, batch * (12 * states**2 * channels + 40 * states**2), 2 * batch * states)


def plan(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: str, backend: str | None) -> KernelPlan:
    if shapes["B"][0] != shapes["C"][1]:
        raise bad_argument("shapes", got=dict(shapes), expected="B (N, H) and C (H_out, N)")
    return KernelPlan("gramians", choose_backend(device, False, backend), "closed form")


OPS = (
    Op(
        name="gramians",
        title="Gramians",
        about="the Gramians of diagonal systems, in float64",
        function=gramians,
        sizes={"batch": 6, "states": 384, "channels": 512},
        small=tuple({"batch": b, "states": n, "channels": h} for b, n, h in ((2, 5, 3), (1, 1, 1), (3, 40, 8))),
        draw=draw,
        cost=cost,
        plan=plan,
        shapes={"B": "(N, H)", "C": "(H_out, N)"},
        returns=("P", "S", "Q", "S_Q"),
        differentiable=False,
        dtypes=(torch.float64,),
        gpu="compressm.kernels.gramians.gpu",
    ),
)
