"""The gated delta rule on a GPU: what is compiled, checked and tuned."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import torch

from compressm.kernels.core.gpu import BOUNDS, Budget, Call, Check, Config, MachineCode, Shape, Tunable, machine_code_of
from compressm.kernels.gated_delta_rule import (
    triton_backward,
    triton_call,
    triton_channels,
    triton_channels_backward,
    triton_forward,
    triton_launch,
)
from compressm.kernels.gated_delta_rule.record import draw

_FLOAT32 = ("rows", "passing", "erased", "initial", "last", "q_lengths", "k_lengths", "by_decay", "read", "written", "by_gain")
_WITHIN = {
    triton_channels_backward._channel_within_kernel: ("grad_q", "grad_k", "grad_into"),
    triton_channels_backward._channel_keys_kernel: ("of_q", "of_k", "of_into"),
}  # further ones in float32
_COUNTS = ("L", "K", "V", "padded", "padded_k", "heads", "own", "chunks", "all_chunks", "all_steps", "columns")
_ABSENT = dict.fromkeys(("firsts", "ends", "starts", "counts"))
# For CUDA, for ROCm and for sm_90, per number that a lane holds of the tile of v, of the triangle or of the steps, in a turn of
# the longest loop, or of all where there is none.
_BUDGETS = {
    "delta_products_bf16": (Budget(184, 54, 0, 3), Budget(128, 25, 0, 3), Budget(128, 25, 0, 3)),
    "delta_inverse_bf16": (Budget(255, 120, 160, 6), Budget(120, 30, 0, 3), Budget(240, 66, 0, 5)),
    "delta_states_bf16": (Budget(232, 175, 0, 6), Budget(232, 130, 8, 4), Budget(216, 75, 0, 5)),
    "delta_outputs_bf16": (Budget(104, 20, 0, 3), Budget(104, 22, 0, 1), Budget(64, 16, 0, 2)),
    "delta_reverse_bf16": (Budget(255, 230, 16, 7), Budget(280, 215, 16, 6), Budget(255, 96, 0, 5)),
    "delta_pairs_bf16": (Budget(168, 95, 0, 7), Budget(128, 11, 0, 5), Budget(120, 8, 0, 6)),
    "delta_keys_bf16": (Budget(255, 70, 460, 11), Budget(328, 73, 0, 10), Budget(216, 53, 0, 10)),
    "channel_products_bf16": (Budget(128, 29, 0, 11), Budget(88, 25, 0, 9), Budget(128, 28, 0, 11)),
    "channel_within_bf16": (Budget(152, 8, 0, 19), Budget(104, 7, 12, 16), Budget(184, 8, 0, 19)),
    "channel_keys_bf16": (Budget(255, 95, 64, 22), Budget(176, 88, 68, 17), Budget(232, 90, 0, 22)),
    "delta_states_fp32": (Budget(255, 770, 16, 7),) * 3,
    "delta_reverse_fp32": (Budget(255, 1050, 440, 9),) * 3,
    "delta_keys_fp32": (Budget(255, 680, 520, 13),) * 3,
    "delta_rows": (Budget(64, 200, 0, 2), Budget(24, 250, 0, 2), Budget(56, 200, 0, 2)),
    "delta_steps": (Budget(64, 180, 0, 1), Budget(56, 290, 0, 1), Budget(64, 185, 0, 1)),
    "channel_operands": (Budget(112, 175, 0, 2), Budget(56, 158, 0, 2), Budget(88, 175, 0, 2)),
}


def types_of(kernel: Any, dtype: str) -> dict[str, str]:
    """Types of the arguments of a kernel for inputs, and operands of products, of ``dtype``."""
    wide = _FLOAT32 + _WITHIN.get(kernel, ())
    types = {name: "*fp32" if name in wide else f"*{dtype}" for name in kernel.arg_names}
    counts = {name: "i32" for name in types if re.search(r"_[bthnp]$", name) or name in _COUNTS}
    return types | counts | {"scale": "fp32"}


def of_products(target: Any, dtype: str, keys: int, channelwise: bool) -> Iterator[tuple[str, Any, Config, int]]:
    """(name, kernel, constants and options, numbers a lane): those that multiply, as planned for values of 128 channels."""
    settings = triton_call.config_of(keys, 128, dtype == "bf16")
    if target.backend == "hip":
        settings["stages"] = 1
    tiles = {name: settings[name] for name in ("T", "BK", "BP", "BN", "BV")}
    launch = _ABSENT | {"WIDE": True, "WIDE_K": True, "DECAYS": "head"} | tiles
    launch |= triton_call.launch_options(settings, target.warp_size)
    exact = "ieee" if target.backend == "hip" else "tf32x3"
    launch["PRECISION"] = exact if dtype == "fp32" else "ieee"
    T, threads = settings["T"], settings["threads"]
    walk, square, tile = T * settings["BP"] // threads, T * T // threads, T * settings["BV"] // threads
    if channelwise:
        launch |= {"DECAYS": "channel", "rows": None, "BN": settings["BC"]}
        yield "channel_products", triton_channels._channel_products_kernel, launch, square
        yield "channel_within", triton_channels_backward._channel_within_kernel, launch, square
        yield "channel_keys", triton_channels_backward._channel_keys_kernel, launch, tile
        return
    yield "delta_products", triton_forward._delta_products_kernel, launch, square
    inverse = triton_call.square_options(T) | {"EXACT": exact}
    yield "delta_inverse", triton_forward._delta_inverse_kernel, inverse, T * T // (inverse["num_warps"] * target.warp_size)
    yield "delta_states", triton_forward._delta_states_kernel, launch, walk
    yield "delta_outputs", triton_forward._delta_outputs_kernel, launch, tile
    yield "delta_reverse", triton_backward._delta_reverse_kernel, launch, walk
    yield "delta_pairs", triton_backward._delta_pairs_kernel, launch, tile
    yield "delta_keys", triton_backward._delta_keys_kernel, launch, tile


def machine_code(target: Any) -> Iterator[MachineCode]:
    """For aligned widths; float32 is compiled for sm_90 only."""
    main = (target.backend, target.arch) == ("cuda", 90)

    case = machine_code_of(target, types_of, _BUDGETS)
    for dtype in ("bf16", "fp32") if main else ("bf16",):
        for channelwise in (False, True):
            for name, kernel, config, elements in of_products(target, dtype, 128, channelwise):
                if dtype == "bf16" or name in ("delta_states", "delta_reverse", "delta_keys"):
                    yield case(f"{name}_{dtype}", kernel, dtype, config, elements)
    small = _ABSENT | {"T": 64, "BH": triton_call.HEADS, **triton_call.SMALL}
    yield case("delta_rows", triton_forward._delta_rows_kernel, "bf16", small, triton_call.HEADS * 64 // 128, False)
    yield case("delta_steps", triton_backward._delta_steps_kernel, "bf16", small, triton_call.HEADS * 64 // 128, False)
    operands = triton_channels._channel_operands_kernel
    yield case("channel_operands", operands, "bf16", small | {"BN": 16}, 8, False)


def _sizes(batch: int, length: int, groups: int, heads: int, states: int, channels: int) -> dict[str, int]:
    return {
        "batch": batch, "length": length, "groups": groups, "heads": heads, "states": states, "channels": channels,
    }  # fmt: skip


_STATES = {"states": True}


def checks(dtype: torch.dtype) -> Iterator[Check]:
    """In half precision not of few steps: gradients of steps are then sums of few rounded numbers that may cancel."""
    for at, keys in enumerate((12, 13, 40, 100, 128, 300)):
        for length in (1, 33, 257, 2000):
            if dtype == torch.float32 or (length > 33 and (at + length) % 3 == 0):
                values, groups = (64, 6) if (at + length) % 2 else (20, 3)
                yield Check(_sizes(2, length, groups, 6, keys, values), {**_STATES, "channelwise": bool(at % 2)})
    yield Check(_sizes(1, BOUNDS[-1], 3, 6, 13, 64), {**_STATES, "bounds": BOUNDS})
    yield Check(_sizes(1, BOUNDS[-1], 3, 6, 128, 128), {**_STATES, "bounds": BOUNDS, "channelwise": True})
    for keys in (32, 128):
        yield Check(_sizes(8, 2048, 1, 16, keys, 128), _STATES, "heads", 1)


SMOKE = Check(_sizes(1, 9, 1, 2, 3, 2), _STATES, "heads", 1)
SMALL = (
    Check(_sizes(1, 70, 1, 2, 16, 5), {**_STATES, "channelwise": True}),
    Check(_sizes(1, 20, 1, 2, 3, 5), {**_STATES, "bounds": [0, 3, 3, 20]}),
)
LARGE = (Check(_sizes(300, 2048, 32, 32, 16, 128), _STATES, "batch"),)


@functools.lru_cache(maxsize=1)
def _inputs(shape: Shape, device: str) -> tuple[Any, ...]:
    """Arguments of the launches, of a shape (batch, L, H, HV, K, V)."""
    torch.manual_seed(0)
    p = draw(_sizes(*shape), torch.bfloat16, torch.device(device)).tensors
    return (*(p[name] for name in ("q", "k", "v", "g", "beta")), None, None, shape[4] ** -0.5, True)


def _planned(shape: Shape) -> Config:
    return triton_call.config_of(shape[4], shape[5], True)


def forward(shape: Shape, config: Config | None, device: str) -> Call:
    arguments = _inputs(shape, device)
    return lambda: triton_launch.forward(*arguments, config)


def backward(shape: Shape, config: Config | None, device: str) -> Call:
    arguments = _inputs(shape, device)
    generator = torch.Generator(device).manual_seed(1)
    weight = torch.randn(arguments[2].shape, device=device, generator=generator).to(arguments[2].dtype)
    return lambda: triton_launch.backward(weight, None, *arguments, config)[:5]


def tunables() -> tuple[Tunable, ...]:
    sizes = (8, 2048, 16, 32, 128, 128), (8, 2048, 16, 32, 32, 128), (1, 8192, 16, 32, 128, 128)
    shapes = {f"B{b} L{n} H{h} HV{hv} K{k} V{v}": (b, n, h, hv, k, v) for b, n, h, hv, k, v in sizes}
    profiled = (8, 2048, 16, 32, 128, 128)
    base = _planned(profiled)
    configs = tuple(
        base | {"T": T, "BP": BP, "threads": threads, "stages": stages}
        for T in (32, 64)
        for BP in (16, 32, 64)
        for threads in (128, 256)
        for stages in (1, 2)
    )

    def least(wide: int, shared: int) -> Any:
        return lambda shape: 2 * shape[0] * shape[1] * (wide * shape[3] * shape[5] + shared * shape[2] * shape[4])

    def small(config: Config) -> Shape:
        return 1, config["T"] + 8, 1, 1, 40, config["BP"]

    return (
        Tunable(
            "gated_delta_rule forward", triton_forward._delta_states_kernel, "delta_states_bf16", configs, shapes, small,
            forward, _planned, least(2, 2), profiled=profiled,
        ),
        Tunable(
            "gated_delta_rule backward", triton_backward._delta_keys_kernel, "delta_keys_bf16", configs, shapes, small,
            backward, _planned, least(3, 4), profiled=profiled,
        ),
    )  # fmt: skip


def forget() -> None:
    """Give the inputs of the launches back."""
    _inputs.cache_clear()
