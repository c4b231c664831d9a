"""The selective scan on a GPU: what is compiled, checked and tuned."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import torch

from compressm.kernels.core.gpu import BOUNDS, Budget, Call, Check, Config, MachineCode, Shape, Tunable, by_target
from compressm.kernels.selective_scan import triton_backward, triton_forward, triton_launch
from compressm.kernels.selective_scan.record import draw

# sm_90: three programs of 128 lanes a multiprocessor in the forward.  Spills are those of the tiles' prologues, not of the loop
# over states; conversions are the sums over channels, of a warp's (by shuffles) and of a program's.
_BUDGETS = {
    "selective_fwd_bf16": (Budget(208, 12.2), Budget(176, 12.5, 12), Budget(168, 12.2)),
    "selective_fwd_fp32": (Budget(168, 11.5),) * 3,
    "selective_bwd_bf16": (Budget(255, 33, 300, 17), Budget(288, 66, 60, 17), Budget(255, 33, 300, 17)),
    "selective_bwd_fp32": (Budget(255, 32.5, 300, 17),) * 3,
    "selective_bwd_deterministic_bf16": (Budget(255, 35.5, 300, 17),) * 3,
}


def types_of(kernel: Any, dtype: str, float32: str) -> dict[str, str]:
    """Types of the arguments of a kernel: those that ``float32`` names are float32, other tensors ``dtype``."""
    wide = float32.split()
    types = {name: "*fp32" if name in wide else f"*{dtype}" for name in kernel.arg_names}
    for name in types:
        if re.search(r"_[bdtn]$", name) or name in ("L", "N", "steps", "width", "head", "channels", "groups", "one"):
            types[name] = "i32"
    return types | {"cu_seqlens": "*i32", "rows": "*i64"}


def machine_code(target: Any) -> Iterator[MachineCode]:
    """For many aligned channels; the types that differ are compiled for sm_90 only."""
    main = (target.backend, target.arch) == ("cuda", 90)
    shared = {"FAST": target.backend == "cuda", "SOFTPLUS": True, "enable_fp_fusion": True}
    shared |= {"TRAIN": True, "EVEN": True, "cu_seqlens": None}
    shared |= dict.fromkeys(("U", "DELTA", "Z", "OUT", "GRAD", "Y", "GDELTA", "GZ"), triton_launch.TIME)
    settings = triton_launch._config(8, 1536, 2048, 16)
    warps = settings["threads"] // target.warp_size
    shared |= {key: settings[key] for key in ("R", "BD", "T")}
    elements = 8 * settings["R"]

    def case(name: str, kernel: Any, dtype: str, float32: str, config: Config) -> MachineCode:
        types, budget = types_of(kernel, dtype, float32), by_target(target, *_BUDGETS[name])
        return MachineCode(name, kernel, types, shared | config, budget, elements, inner=True)

    kernel = triton_forward._selective_scan_fwd_kernel
    for dtype in ("bf16", "fp32") if main else ("bf16",):
        yield case(f"selective_fwd_{dtype}", kernel, dtype, "A D bias initial last carries", {"num_warps": warps})
    kernel = triton_backward._selective_scan_bwd_kernel
    float32 = "A D bias grad_last carries scratch grad_BC grad_D grad_bias"
    for dtype in ("bf16", "fp32") if main else ("bf16",):
        config = {"DETERMINISTIC": False, "W": warps, "num_warps": warps}
        yield case(f"selective_bwd_{dtype}", kernel, dtype, float32, config)
    if main:
        config = {"DETERMINISTIC": True, "W": 2 * warps, "num_warps": 2 * warps, "BD": 2 * settings["BD"]}
        yield case("selective_bwd_deterministic_bf16", kernel, "bf16", float32, config)


def _sizes(batch: int, channels: int, length: int, states: int) -> dict[str, int]:
    return {"batch": batch, "channels": channels, "length": length, "states": states}


_FIRST = {"channels_last": False, "states": True}


def checks(dtype: torch.dtype) -> Iterator[Check]:
    for at, states in enumerate((12, 13, 100, 128, 300)):
        for length in (1, 33, 257, 2000, 2048):
            if dtype == torch.float32 or (at + length) % 3 == 0:
                variant = {"groups": 3 if length % 2 else 1, "channels_last": bool((at + length // 2) % 2), "states": True}
                yield Check(_sizes(2, 48, length, states), variant)
    yield Check(_sizes(1, 48, BOUNDS[-1], 13), {**_FIRST, "bounds": BOUNDS})
    yield Check(_sizes(2, 40, 264, 16), {"bare": True, "channels_last": False})
    for states in (16, 128):
        yield Check(_sizes(8, 1536, 2048, states), _FIRST, "channels", 16)
    yield Check(_sizes(8, 1536, 2000, 12), {"channels_last": True, "states": True}, "channels", 16)


SMOKE = Check(_sizes(1, 2, 9, 2), _FIRST, "channels", 2)
SMALL = (Check(_sizes(1, 36, 136, 3), _FIRST), Check(_sizes(1, 4, 20, 3), {**_FIRST, "bounds": [0, 3, 3, 20]}))
LARGE = (
    Check(_sizes(512, 2050, 2048, 8), _FIRST, "batch"),
    Check(_sizes(1, 262_208, 8200, 2), {"channels_last": True, "states": True}, "channels", 16),
    Check(_sizes(1, 262_208, 8200, 2), {"channels_last": False, "bare": True}, "channels", 16),
    Check(_sizes(204, 4000, 2048, 300), {"channels_last": False, "bare": True}, "batch"),
)


@functools.lru_cache(maxsize=1)
def inputs(shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Arguments of the launches, (batch, D, L, N), up to delta_softplus."""
    torch.manual_seed(0)
    p = draw(_sizes(*shape), dtype, torch.device(device), channels_last=False).tensors
    return (*(p[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")), None, None)


def _planned(shape: Shape, threads: int = triton_launch.THREADS) -> Config:
    batch, channels, length, states = shape
    return triton_launch._config(batch, channels, length, states, 1, threads)


def forward(shape: Shape, config: Config | None, device: str) -> Call:
    arguments = inputs(shape, device)
    return lambda: triton_launch.forward(*arguments, True, True, config)[:2]


def backward(shape: Shape, config: Config | None, device: str, deterministic: bool = False) -> Call:
    arguments = inputs(shape, device)
    planned = _planned(shape)
    tiles = planned if config is None else planned | {key: config[key] for key in ("R", "BD", "T", "threads")}
    out, _, checkpoints, y = triton_launch.forward(*arguments, True, True, tiles)
    weight = torch.randn(out.shape, device=device, generator=torch.Generator(device).manual_seed(1)).to(out.dtype)

    def call() -> tuple[torch.Tensor, ...]:
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        try:
            return triton_launch.backward(weight, None, *arguments, checkpoints, y, True, config)[:6]
        finally:
            torch.use_deterministic_algorithms(False)

    return call


def _tiles(
    rows: tuple[int, ...], steps: tuple[int, ...], threads: tuple[int, ...], registers: tuple[int | None, ...]
) -> Iterator[Config]:
    for R in rows:
        for T in steps:
            for count in threads:
                for most in registers:
                    limit = {} if most is None else {"maxnreg": most}
                    yield {"R": R, "BD": count * 8 // T, "T": T, "threads": count, **limit}


def tunables() -> tuple[Tunable, ...]:
    shapes = {"B8 D1536 L2048 N16": (8, 1536, 2048, 16), "B8 D1536 L2048 N128": (8, 1536, 2048, 128),
              "B4 D2560 L4096 N16": (4, 2560, 4096, 16), "B1 D1536 L2048 N16": (1, 1536, 2048, 16)}  # fmt: skip
    fwd, bwd = triton_forward._selective_scan_fwd_kernel, triton_backward._selective_scan_bwd_kernel
    steps, profiled = (32, 64, 128, 256), (8, 1536, 2048, 16)

    def small(config: Config) -> Shape:
        return 1, config["R"] * config["BD"], 2 * config["T"] + 8, 3

    def least(wide: int, shared: int) -> Any:
        return lambda shape: 2 * shape[0] * shape[2] * (wide * shape[1] + shared * shape[3])

    return (
        Tunable(
            "selective_scan forward", fwd, "selective_fwd_bf16", tuple(_tiles((1, 2), steps, (64, 128, 256), (None, 128))),
            shapes, small, forward, _planned, least(4, 2), profiled=profiled,
        ),
        Tunable(
            "selective_scan backward", bwd, "selective_bwd_bf16", tuple(_tiles((1, 2), steps, (64, 128), (None, 168))),
            shapes, small, backward, _planned, least(8, 4), profiled=profiled,
        ),
        Tunable(
            "selective_scan backward, deterministic", bwd, "selective_bwd_deterministic_bf16",
            tuple(_tiles((1, 2), (64, 128), (128, 256), (None,))), shapes, small,
            functools.partial(backward, deterministic=True), lambda shape: _planned(shape, 2 * triton_launch.THREADS),
            least(8, 4),
        ),
    )  # fmt: skip


def forget() -> None:
    """Give the inputs of the launches back."""
    inputs.cache_clear()
