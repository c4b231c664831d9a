"""The causal convolution on a GPU: what is compiled, checked and tuned."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from compressm.kernels.causal_conv1d import triton_convolution as kernels
from compressm.kernels.causal_conv1d.record import draw
from compressm.kernels.core.gpu import FUSION, Budget, Call, Check, Config, MachineCode, Shape, Tunable, by_target

_TYPES = dict.fromkeys(("weight", "bias", "state", "grad_state", "shares"), "*fp32") | dict.fromkeys(
    ("D", "L", "stretches", "stride_b", "stride_d", "grad_stride_b", "grad_stride_d"), "i32"
)
# For the whole kernel, with the branches that few programs take; Triton 3.6 masks every load with a branch of its own on AMD.
_BUDGETS = {
    "conv_fwd_fp32": (Budget(48, 95), Budget(40, 345)),
    "conv_fwd_bf16": (Budget(48, 100), Budget(40, 350)),
    "conv_bwd_fp32": (Budget(88, 280), Budget(72, 700)),
    "conv_bwd_bf16": (Budget(88, 295), Budget(72, 720)),
}


def machine_code(target: Any) -> Iterator[MachineCode]:
    config = kernels.CONFIG | {"WIDTH": 4, "SILU": True}
    elements = config["BT"] // (config["num_warps"] * target.warp_size)
    for dtype in ("fp32", "bf16"):
        types = _TYPES | dict.fromkeys(("x", "out", "grad", "grad_x"), f"*{dtype}")
        for way, kernel in (("fwd", kernels._causal_conv1d_fwd_kernel), ("bwd", kernels._causal_conv1d_bwd_kernel)):
            name = f"conv_{way}_{dtype}"
            yield MachineCode(name, kernel, types, config, by_target(target, *_BUDGETS[name]), elements, loop=False)


def _sizes(batch: int, channels: int, length: int, width: int = 4) -> dict[str, int]:
    return {"batch": batch, "channels": channels, "length": length, "width": width}


def checks(dtype: torch.dtype) -> Iterator[Check]:
    for width in (1, 3, 4, 8):
        for length in (1, 33, 257, 2000, 2048):
            variant = {"channels_last": length % 2 == 1, "silu": width != 3, "sliced": False, "states": True}
            yield Check(_sizes(2, 48, length, width), variant)
    yield Check(_sizes(8, 1536, 2048), {"states": True})


_WHOLE = {"sliced": False, "states": True}
SMOKE = Check(_sizes(1, 2, 9), _WHOLE)
SMALL = (Check(_sizes(1, 3, 20), _WHOLE),)
LARGE = (Check(_sizes(520, 2050, 2048), _WHOLE, "batch"),)


@functools.lru_cache(maxsize=1)
def _inputs(shape: Shape, device: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return draw(_sizes(*shape), torch.bfloat16, torch.device(device), **_WHOLE).tensors


def forward(shape: Shape, config: Config | None, device: str) -> Call:
    x, weight, bias, states = _inputs(shape, device).values()
    return lambda: (kernels.forward(x, weight, bias, None, states, None, True, config),)


def backward(shape: Shape, config: Config | None, device: str) -> Call:
    x, weight, bias, states = _inputs(shape, device).values()
    return lambda: kernels.backward(x, x, weight, bias, None, states, None, True, config)


def _of_torch(shape: Shape, device: str) -> Callable[[], object]:
    p = _inputs(shape, device)
    x, weight, bias = p["x"], p["weight"].to(p["x"].dtype)[:, None], p["bias"].to(p["x"].dtype)
    conv, silu = torch.nn.functional.conv1d, torch.nn.functional.silu
    return lambda: silu(conv(x, weight, bias, padding=3, groups=x.shape[1])[..., : x.shape[2]])


def tunables() -> tuple[Tunable, ...]:
    configs = tuple({"BT": BT, "num_warps": w, **FUSION} for BT in (256, 512, 1024, 2048) for w in (1, 2, 4, 8))
    shapes = {"B8 D1536 L2048": (8, 1536, 2048), "B1 D5120 L4096": (1, 5120, 4096)}

    def small(config: Config) -> Shape:
        return 1, 3, 2 * config["BT"] + 8

    def least(passes: int) -> Callable[[Shape], int]:
        return lambda shape: 2 * passes * shape[0] * shape[1] * shape[2]

    return (
        Tunable(
            "causal_conv1d forward", kernels._causal_conv1d_fwd_kernel, "conv_fwd_bf16", configs, shapes, small, forward,
            lambda shape: kernels.CONFIG, least(2), smoke=(1, 2, 20), rivals={"F.conv1d, F.silu": _of_torch},
        ),
        Tunable(
            "causal_conv1d backward", kernels._causal_conv1d_bwd_kernel, "conv_bwd_bf16", configs, shapes, small, backward,
            lambda shape: kernels.CONFIG, least(3),
        ),
    )  # fmt: skip


def forget() -> None:
    """Give the inputs of the launches back."""
    _inputs.cache_clear()
