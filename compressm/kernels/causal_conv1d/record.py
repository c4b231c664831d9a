"""The record of the causal convolution."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from compressm.errors import bad_argument
from compressm.kernels.causal_conv1d.cpu import MAX_WIDTH
from compressm.kernels.causal_conv1d.op import causal_conv1d, choose_backend
from compressm.kernels.core.op import WORD, Cost, Function, Measured, Op, Sample
from compressm.kernels.core.plan import KernelPlan


def draw(
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    channels_last: bool | None = None,
    sliced: bool = True,
    silu: bool = True,
    states: bool = False,
) -> Sample:
    """With bias.

    Args:
        channels_last: channels lie next to each other in memory; None: on a CPU, as a Mamba layer's projection leaves them.
        sliced: x is one half of a projection's columns.
        silu: with the activation.
        states: with initial and final states.
    """
    batch, length, channels, width = (sizes[name] for name in ("batch", "length", "channels", "width"))
    columns = 2 * channels if sliced else channels
    if (device.type == "cpu") if channels_last is None else channels_last:
        x = torch.randn(batch, length, columns, device=device).to(dtype)[..., :channels].mT
    else:
        x = torch.randn(batch, columns, length, device=device).to(dtype)[:, :channels]
    tensors = {"x": x, "weight": torch.randn(channels, width, device=device), "bias": torch.randn(channels, device=device)}
    if states:
        tensors["initial_states"] = torch.randn(batch, channels, width - 1, device=device)
    along = {
        "batch": {"x": 0, "initial_states": 0, "out": 0, "final_states": 0},
        "channels": {"x": 1, "weight": 0, "bias": 0, "initial_states": 1, "out": 1, "final_states": 1},
    }
    return Sample(tensors, {"activation": "silu" if silu else None, "return_final_states": states}, along)


def cost(sizes: Mapping[str, int], word: int, backward: bool) -> Cost:
    """With bias and SiLU."""
    wide = sizes["batch"] * sizes["channels"] * sizes["length"]
    parameters = sizes["channels"] * (sizes["width"] + 1)
    flops, exponentials, moved = wide * (2 * sizes["width"] + 2), wide, word * 2 * wide + WORD * parameters
    if backward:
        flops, exponentials, moved = 3 * flops, 2 * exponentials, moved + word * 3 * wide + 2 * WORD * parameters
    return Cost(moved, flops, exponentials)


def plan(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: str, backend: str | None) -> KernelPlan:
    if shapes["x"][1] != shapes["weight"][0]:
        raise bad_argument("shapes", got=dict(shapes), expected="x (batch, D, L) and weight (D, width)")
    chosen = choose_backend(device, dtype, shapes["weight"][1] > MAX_WIDTH, False, backend=backend)
    return KernelPlan("causal_conv1d", chosen, "taps", (("width", shapes["weight"][1]),))


def _conv1d(sizes: Mapping[str, int], dtype: torch.dtype) -> Function:
    width, channels, length = sizes["width"], sizes["channels"], sizes["length"]

    def call(p: dict[str, Tensor]) -> Tensor:
        out = F.conv1d(p["x"], p["weight"].to(dtype)[:, None], p["bias"].to(dtype), padding=width - 1, groups=channels)
        return F.silu(out[..., :length])

    return call


def _shifted(sizes: Mapping[str, int], dtype: torch.dtype) -> Function:
    width, length = sizes["width"], sizes["length"]

    def call(p: dict[str, Tensor]) -> Tensor:
        rows = F.pad(p["x"].mT, (0, 0, width - 1, 0))
        taps = torch.stack([p["weight"][:, k].to(dtype) * rows[:, k : k + length] for k in range(width)]).sum(0)
        return F.silu(taps + p["bias"].to(dtype)).mT

    return call


def measured(gpu: bool) -> tuple[Measured, ...]:
    sizes = {"batch": 8, "channels": 1536, "length": 2048} if gpu else {"batch": 2, "channels": 512, "length": 1024}
    return (Measured(({**sizes, "width": 4},)),)


OPS = (
    Op(
        name="causal_conv1d",
        title="Causal convolution",
        about="Mamba's short convolution with SiLU",
        function=causal_conv1d,
        sizes={"batch": 2, "channels": 512, "length": 1024, "width": 4},
        small=tuple(
            {"batch": b, "channels": d, "length": n, "width": w}
            for b, d, n, w in ((2, 7, 33, 4), (1, 48, 1, 3), (3, 5, 257, 8))
        ),
        draw=draw,
        cost=cost,
        plan=plan,
        shapes={"x": "(batch, D, L)", "weight": "(D, width)"},
        returns=("out", "final_states"),
        rivals={"F.conv1d": _conv1d},
        compiled=_shifted,
        measured=measured,
        gpu="compressm.kernels.causal_conv1d.gpu",
    ),
)

