"""The record of the selective scan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels.core.op import WORD, Cost, Function, Measured, Op, Sample
from compressm.kernels.core.plan import KernelPlan
from compressm.kernels.core.unrolled import UNROLL, compiled_chunk, first_state
from compressm.kernels.selective_scan.op import plan_for_shapes, selective_scan


def draw(
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    groups: int = 1,
    channels_last: bool | None = None,
    bounds: Sequence[int] | None = None,
    bare: bool = False,
    states: bool = False,
) -> Sample:
    """Step sizes of 1e-3 to 1e-1, as a layer begins with; with skip, gate and softplus.

    Args:
        groups: of channels that share B and C.
        channels_last: channels lie next to each other in memory; None: on a CPU, as a Mamba layer hands them over.
        bounds: cu_seqlens of packed sequences.
        bare: without skip, gate, bias and softplus.
        states: with initial and last states.
    """
    batch, length, channels, n = (sizes[name] for name in ("batch", "length", "channels", "states"))
    last = (device.type == "cpu") if channels_last is None else channels_last

    def wide() -> Tensor:
        if last:
            return torch.randn(batch, length, channels, device=device).to(dtype).mT
        return torch.randn(batch, channels, length, device=device).to(dtype)

    tensors = {
        "u": wide(),
        "delta": wide().mul_(0.3),
        "A": -torch.arange(1.0, n + 1, device=device).repeat(channels, 1),
        "B": torch.randn(batch, groups, n, length, device=device).to(dtype),
        "C": torch.randn(batch, groups, n, length, device=device).to(dtype),
    }
    if bare:
        tensors["delta"] = tensors["delta"].abs_().mul_(0.1)
    else:
        step = torch.exp(torch.empty(channels, device=device).uniform_(math.log(1e-3), math.log(1e-1)))
        tensors |= {"D": torch.randn(channels, device=device), "z": wide(), "delta_bias": step.expm1().log()}
    options: dict[str, Any] = {"delta_softplus": not bare, "return_last_state": states}
    if bounds is not None:
        options["cu_seqlens"] = torch.tensor(bounds, device=device, dtype=torch.int32)
    if states:
        sequences = batch if bounds is None else len(bounds) - 1
        tensors["initial_state"] = torch.randn(sequences, channels, n, device=device)
    wides = ("u", "delta", "z", "initial_state", "out", "last_state")
    channelwise = dict.fromkeys(wides, 1) | dict.fromkeys(("A", "D", "delta_bias"), 0)
    along = {"channels": channelwise} if groups == 1 else {}
    if bounds is None:
        along["batch"] = dict.fromkeys((*wides, "B", "C"), 0)
    return Sample(tensors, options, along)


def cost(sizes: Mapping[str, int], word: int, backward: bool) -> Cost:
    """With skip, gate and softplus, B and C of one group."""
    batch, length, channels, states = (sizes[name] for name in ("batch", "length", "channels", "states"))
    wide, shared, parameters = batch * channels * length, batch * states * length, channels * (states + 2)
    cells = wide * states
    flops, exponentials = 6 * cells + 8 * wide, cells + 3 * wide
    moved = word * (4 * wide + 2 * shared) + WORD * parameters
    if backward:
        flops += 18 * cells + 16 * wide
        exponentials *= 2
        moved += word * (7 * wide + 4 * shared) + 2 * WORD * parameters
    return Cost(moved, flops, exponentials)


def plan(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: str, backend: str | None) -> KernelPlan:
    (batch, channels, length), (rows, states) = shapes["u"], shapes["A"]
    if rows != channels:
        raise bad_argument("shapes", got=dict(shapes), expected="u (batch, D, L) and A (D, N)")
    return plan_for_shapes(device, dtype, batch, channels, length, states, False, backend)


def _steps(h: Tensor, dt: Tensor, drive: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple:
    """A few steps: (state behind them, the output (batch, D) of each); time comes first."""
    outputs = []
    for t in range(dt.shape[0]):
        h = torch.exp(dt[t][..., None] * A) * h + drive[t][..., None] * B[t][:, None]
        outputs.append((h * C[t][:, None]).sum(-1))
    return h, tuple(outputs)


def in_compiled_chunks(sizes: Mapping[str, int], dtype: torch.dtype) -> Function:
    """Of one group, with skip, gate and softplus: some steps unrolled and compiled, called once a chunk."""
    chunk = compiled_chunk(_steps)

    def call(p: dict[str, Tensor]) -> Tensor:
        dt = torch.nn.functional.softplus(p["delta"].float() + p["delta_bias"][:, None])
        along = (dt, dt * p["u"], p["B"][:, 0].float(), p["C"][:, 0].float())
        pieces = [t.movedim(-1, 0).contiguous().split(UNROLL) for t in along]
        h = first_state(p["A"], p["u"].shape[0], *p["A"].shape)
        outputs: list[Tensor] = []
        for gain, drive, B, C in zip(*pieces, strict=True):
            h, y = chunk(h, gain, drive, p["A"], B, C)
            outputs += y
        y = (torch.stack(outputs, 2) + p["D"][:, None] * p["u"]) * torch.nn.functional.silu(p["z"].float())
        return y.to(p["u"].dtype)

    return call


def measured(gpu: bool) -> tuple[Measured, ...]:
    base = {"batch": 8, "channels": 1536, "length": 2048} if gpu else {"batch": 2, "channels": 512, "length": 1024}

    def over(*states: int) -> tuple[dict[str, int], ...]:
        return tuple({**base, "states": n} for n in states)

    return (Measured(over(128, 12)), *((Measured(over(128, 16, 12), "bfloat16"),) if gpu else ()))


OPS = (
    Op(
        name="selective_scan",
        title="Selective scan",
        about="Mamba's scan with gate and softplus",
        function=selective_scan,
        sizes={"batch": 2, "channels": 512, "length": 1024, "states": 128},
        small=tuple(
            {"batch": b, "channels": d, "length": n, "states": s}
            for b, d, n, s in ((2, 7, 33, 5), (1, 48, 1, 13), (3, 5, 257, 1), (1, 17, 40, 100))
        ),
        draw=draw,
        cost=cost,
        plan=plan,
        shapes={"u": "(batch, D, L)", "A": "(D, N)"},
        returns=("out", "last_state"),
        compiled=in_compiled_chunks,
        measured=measured,
        gpu="compressm.kernels.selective_scan.gpu",
    ),
)
