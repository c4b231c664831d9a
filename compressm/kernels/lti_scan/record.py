"""The record of the LTI scan."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels.core.op import WORD, Cost, Function, Measured, Op, Sample
from compressm.kernels.core.plan import KernelPlan
from compressm.kernels.core.unrolled import UNROLL, compiled_chunk, first_state
from compressm.kernels.lti_scan.op import lti_scan_planar, plan_for_shapes


def ring(states: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """log_decay and phase (N,) of an LRU's initial eigenvalues, 0.9 <= |lam| <= 0.999."""
    squared = torch.rand(states, device=device) * (0.999**2 - 0.9**2) + 0.9**2
    return 0.5 * squared.log(), 2 * math.pi * torch.rand(states, device=device)


def draw(sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> Sample:
    """With feedthrough and an LRU's initial eigenvalues."""
    batch, length, channels, states = (sizes[name] for name in ("batch", "length", "channels", "states"))
    log_decay, phase = ring(states, device)
    gamma = torch.sqrt(-torch.expm1(2 * log_decay))[:, None]
    tensors = {
        "u": torch.randn(batch, length, channels, device=device).to(dtype),
        "log_decay": log_decay,
        "phase": phase,
        **{name: gamma * torch.randn(states, channels, device=device) / (2 * channels) ** 0.5 for name in ("B_re", "B_im")},
        **{name: torch.randn(channels, states, device=device) / states**0.5 for name in ("C_re", "C_im")},
        "D": torch.randn(channels, device=device),
    }
    return Sample(tensors, {}, {"batch": {"u": 0, "out": 0}})


def cost(sizes: Mapping[str, int], word: int, backward: bool) -> Cost:
    """As many outputs as inputs, feedthrough included."""
    batch, length, channels, states = (sizes[name] for name in ("batch", "length", "channels", "states"))
    rows, weights = batch * length, 4 * channels * states + 3 * states + channels
    flops = rows * (4 * states * channels * 2 + 8 * states + 2 * channels)
    moved = word * rows * 2 * channels + WORD * weights
    if backward:
        flops += rows * (4 * states * channels * 4 + 16 * states + 4 * channels)
        moved += word * rows * 3 * channels + 2 * WORD * weights
    return Cost(moved, flops, states)


def plan(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: str, backend: str | None) -> KernelPlan:
    (batch, length, channels), (states, inputs), (outputs, columns) = shapes["u"], shapes["B"], shapes["C"]
    if inputs != channels or columns != states:
        raise bad_argument("shapes", got=dict(shapes), expected="u (batch, L, H), B (N, H) and C (H_out, N)")
    return plan_for_shapes(device, dtype, batch, length, channels, outputs, states, backend)


def _steps(re: Tensor, im: Tensor, lam_re: Tensor, lam_im: Tensor, x_re: Tensor, x_im: Tensor) -> tuple:
    """A few steps of a complex diagonal recurrence, planar: (state behind them, all states (steps, batch, N))."""
    res, ims = [], []
    for t in range(x_re.shape[0]):
        re, im = lam_re * re - lam_im * im + x_re[t], lam_re * im + lam_im * re + x_im[t]
        res.append(re)
        ims.append(im)
    return re, im, torch.stack(res), torch.stack(ims)


def in_compiled_chunks(sizes: Mapping[str, int], dtype: torch.dtype) -> Function:
    """Products, the recurrence in compiled chunks, products."""
    chunk = compiled_chunk(_steps)

    def call(p: dict[str, Tensor]) -> Tensor:
        modulus = p["log_decay"].exp()
        lam_re, lam_im = modulus * p["phase"].cos(), modulus * p["phase"].sin()
        u = p["u"].float()
        x_re, x_im = (((u @ p[name].T).transpose(0, 1)).contiguous().split(UNROLL) for name in ("B_re", "B_im"))
        re, im = (first_state(lam_re, u.shape[0], lam_re.shape[0]) for _ in range(2))
        states_re, states_im = [], []
        for part_re, part_im in zip(x_re, x_im, strict=True):
            re, im, all_re, all_im = chunk(re, im, lam_re, lam_im, part_re, part_im)
            states_re.append(all_re)
            states_im.append(all_im)
        y = torch.cat(states_re) @ p["C_re"].T - torch.cat(states_im) @ p["C_im"].T
        return (y.transpose(0, 1) + p["D"] * u).to(p["u"].dtype)

    return call


def measured(gpu: bool) -> tuple[Measured, ...]:
    """The paper's sequential MNIST and CIFAR, at full size and after a cut."""
    mnist = {"batch": 50, "length": 784, "channels": 8}
    cifar = {"batch": 50 if gpu else 16, "length": 1024, "channels": 512}
    rows = ((mnist, (256, 28)), (cifar, (384, 93)))
    return tuple(Measured(tuple({**base, "states": n} for n in states), backward_only=True) for base, states in rows)


OPS = (
    Op(
        name="lti_scan",
        title="LTI scan",
        about="the scan of an LRU, S5 or S4D layer with its projections in and out",
        function=lti_scan_planar,
        sizes={"batch": 16, "length": 1024, "channels": 512, "states": 384},
        small=tuple(
            {"batch": b, "length": n, "channels": h, "states": s}
            for b, n, h, s in ((2, 33, 3, 5), (1, 1, 8, 13), (3, 257, 2, 1), (2, 64, 1, 40))
        ),
        draw=draw,
        cost=cost,
        plan=plan,
        shapes={"u": "(batch, L, H)", "B": "(N, H)", "C": "(H_out, N)"},
        compiled=in_compiled_chunks,
        measured=measured,
        gpu="compressm.kernels.lti_scan.gpu",
    ),
)
