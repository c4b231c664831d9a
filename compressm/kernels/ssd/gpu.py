"""Mamba-2's scan on a GPU: what is compiled, checked and tuned."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import torch

from compressm.kernels.core.gpu import BOUNDS, Budget, Call, Check, Config, MachineCode, Shape, Tunable, machine_code_of
from compressm.kernels.ssd import triton_backward, triton_forward, triton_launch
from compressm.kernels.ssd.record import draw

_FLOAT32 = (
    "A", "D", "bias", "decays", "initial", "last", "by_decay", "reads", "writes", "by_step", "grad_A", "grad_bias", "grad_D",
)  # fmt: skip
_COUNTS = ("L", "N", "P", "padded", "heads", "own", "few", "chunks", "all_steps")
_ABSENT = dict.fromkeys(("z", "y", "grad_z", "segments", "firsts", "ends", "starts", "counts", "scale"))
# Per number of x in a turn of the loop over heads (of the states: over chunks), for CUDA, for ROCm and for sm_90.  Conversions
# take the results of one product to the operands of another, or sums of its rows to those of its columns.
_BUDGETS = {
    "ssd_states_bf16_N128": (Budget(128, 37, 0, 4), Budget(304, 54, 0, 3), Budget(128, 20, 0, 4)),
    "ssd_outputs_bf16_N128": (Budget(224, 75, 0, 3), Budget(224, 44, 40, 3), Budget(184, 45, 0, 3)),
    "ssd_values_bf16_N128": (Budget(255, 165, 160, 16), Budget(368, 200, 160, 13), Budget(255, 118, 40, 13)),
    "ssd_keys_bf16_N128": (Budget(255, 70, 340, 7), Budget(304, 112, 60, 3), Budget(240, 45, 0, 7)),
    "ssd_states_fp32_N128": (Budget(192, 130, 0, 7),) * 3,
    "ssd_outputs_fp32_N128": (Budget(224, 142, 40, 6),) * 3,
    "ssd_values_fp32_N128": (Budget(255, 420, 1200, 18),) * 3,
    "ssd_keys_fp32_N128": (Budget(255, 190, 480, 15),) * 3,
    "ssd_states_bf16_N16": (Budget(104, 18, 0, 4),) * 3,
    "ssd_outputs_bf16_N16": (Budget(160, 30, 0, 3),) * 3,
    "ssd_values_bf16_N16": (Budget(255, 88, 40, 13),) * 3,
    "ssd_keys_bf16_N16": (Budget(240, 40, 0, 7),) * 3,
    "ssd_decays": (Budget(72, 170), Budget(32, 300), Budget(72, 170)),
    "ssd_steps": (Budget(64, 215, 0, 3), Budget(32, 400, 0, 3), Budget(64, 215, 0, 3)),
}


def types_of(kernel: Any, dtype: str) -> dict[str, str]:
    """Types of the arguments of a kernel for inputs, and operands of products, of ``dtype``."""
    types = {name: "*fp32" if name in _FLOAT32 else f"*{dtype}" for name in kernel.arg_names}
    counts = {name: "i32" for name in types if re.search(r"_[btghpn]$", name) or name in _COUNTS}
    return types | counts | dict.fromkeys(("low", "high", "scale"), "fp32")


def of_products(
    target: Any, dtype: str, states: int, heads: int = 24, groups: int = 1, width: int = 64, scaled: bool = False
) -> Iterator[tuple[str, Any, Config, int]]:
    """(name, kernel, constants and options, numbers of x a lane): the kernels that multiply, as planned for a long sequence.

    scaled: C has a scale, as the queries of linear attention do.
    """
    settings = triton_launch._config(1024, heads, groups, width, states, dtype == "bf16", triton_launch.chunk_steps(states))
    launch = _ABSENT | {"WIDE": True, "WIDE_B": True} | triton_launch.launch_options(settings, target.warp_size)
    launch["PRECISION"] = "tf32x3" if dtype == "fp32" else "ieee"
    if scaled:
        del launch["scale"]
    elements = settings["T"] * settings["BP"] // settings["threads"]
    yield "ssd_states", triton_forward._ssd_states_kernel, launch | {"REVERSE": False}, elements
    yield "ssd_outputs", triton_forward._ssd_outputs_kernel, launch, elements
    yield "ssd_values", triton_backward._ssd_values_kernel, launch, elements
    keys = launch | {"num_stages": triton_launch.keys_stages(settings, width)}
    yield "ssd_keys", triton_backward._ssd_keys_kernel, keys, elements


def machine_code(target: Any) -> Iterator[MachineCode]:
    """For aligned widths; float32, and tiles for few states, are compiled for sm_90 only."""
    main = (target.backend, target.arch) == ("cuda", 90)

    case = machine_code_of(target, types_of, _BUDGETS)
    for dtype, states in (("bf16", 128), ("fp32", 128), ("bf16", 16)) if main else (("bf16", 128),):
        for name, kernel, config, elements in of_products(target, dtype, states):
            yield case(f"{name}_{dtype}_N{states}", kernel, dtype, config, elements)
    constants = _ABSENT | {"T": 64, "BH": triton_launch.HEADS, "SOFTPLUS": True, "SCALED": True, **triton_launch.SMALL}
    elements = triton_launch.HEADS * 64 // (triton_launch.SMALL["num_warps"] * target.warp_size)
    yield case("ssd_decays", triton_forward._ssd_decays_kernel, "bf16", constants, elements, False)
    yield case("ssd_steps", triton_backward._ssd_steps_kernel, "bf16", constants, elements, False)


def _sizes(batch: int, length: int, heads: int, channels: int, states: int, groups: int = 1) -> dict[str, int]:
    return {
        "batch": batch, "length": length, "heads": heads, "channels": channels, "groups": groups, "states": states,
    }  # fmt: skip


_STATES = {"states": True}


def checks(dtype: torch.dtype) -> Iterator[Check]:
    """In half precision not of few steps: the gradient of A is then a sum of few rounded numbers that may cancel."""
    for at, states in enumerate((12, 13, 40, 100, 128, 300)):
        for length in (1, 33, 257, 2000, 2048):
            if dtype == torch.float32 or (length > 33 and (at + length) % 3 == 0):
                channels, groups = (64, 1) if (at + length) % 2 else (20, 3)
                yield Check(_sizes(2, length, 6, channels, states, groups), {"states": True, "gate": bool(at % 2)})
    yield Check(_sizes(1, BOUNDS[-1], 6, 64, 13), {**_STATES, "bounds": BOUNDS})
    yield Check(_sizes(2, 264, 3, 130, 16))
    for states in (16, 128):
        yield Check(_sizes(8, 2048, 24, 64, states), _STATES, "heads", 1)


SMOKE = Check(_sizes(1, 9, 2, 3, 2), _STATES, "heads", 1)
SMALL = (
    Check(_sizes(1, 70, 3, 16, 5), {**_STATES, "gate": True}),
    Check(_sizes(1, 20, 2, 3, 5), {**_STATES, "bounds": [0, 3, 3, 20]}),
)
LARGE = (
    Check(_sizes(520, 2048, 32, 64, 8), _STATES, "batch"),
    Check(_sizes(128, 2048, 32, 64, 300), {}, "batch"),
)


@functools.lru_cache(maxsize=1)
def _inputs(shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    """Arguments of the launches, of a shape (batch, L, H, P, N) in one group."""
    torch.manual_seed(0)
    p = draw(_sizes(*shape), dtype, torch.device(device)).tensors
    tensors = (*(p[name] for name in ("x", "dt", "A", "B", "C", "D")), None, p["dt_bias"], None, None, None)
    return (*tensors, True, 0.0, math.inf, True, 1.0, 0)


def _planned(shape: Shape) -> Config:
    batch, length, heads, channels, states = shape
    T = triton_launch.chunk_steps(states)
    return triton_launch._config(batch * -(-length // T), heads, 1, channels, states, True, T)


def forward(shape: Shape, config: Config | None, device: str) -> Call:
    arguments = _inputs(shape, device)
    return lambda: triton_launch.forward(*arguments, config)


def backward(shape: Shape, config: Config | None, device: str) -> Call:
    arguments = _inputs(shape, device)
    generator = torch.Generator(device).manual_seed(1)
    weight = torch.randn(arguments[0].shape, device=device, generator=generator).to(arguments[0].dtype)
    return lambda: triton_launch.backward(weight, None, *arguments, config)[:6]


def tunables() -> tuple[Tunable, ...]:
    shapes = {"B8 L2048 H24 P64 N128": (8, 2048, 24, 64, 128), "B8 L2048 H24 P64 N16": (8, 2048, 24, 64, 16),
              "B2 L4096 H80 P64 N128": (2, 4096, 80, 64, 128), "B1 L8192 H24 P64 N32": (1, 8192, 24, 64, 32)}  # fmt: skip
    profiled = (8, 2048, 24, 64, 128)
    base = _planned(profiled)
    configs = tuple(
        base | {"T": T, "BN": BN, "few": few, "threads": threads, "stages": stages} | limit
        for T, threads in ((32, 128), (64, 128), (64, 256), (128, 256))
        for BN in (32, 64)
        for few in (6, 24)
        for stages in (1, 2)
        for limit in (({}, {"maxnreg": 128}) if threads == 256 else ({},))
    )

    def least(wide: int, shared: int) -> Any:
        return lambda shape: 2 * shape[0] * shape[1] * (wide * shape[2] * shape[3] + shared * shape[4])

    def small(config: Config) -> Shape:
        return 1, config["T"] + 8, 3, config["BP"], 40

    return (
        Tunable(
            "ssd forward", triton_forward._ssd_outputs_kernel, "ssd_outputs_bf16_N128", configs, shapes, small, forward,
            _planned, least(2, 2), profiled=profiled,
        ),
        Tunable(
            "ssd backward", triton_backward._ssd_values_kernel, "ssd_values_bf16_N128", configs, shapes, small, backward,
            _planned, least(3, 4), profiled=profiled,
        ),
    )  # fmt: skip


def forget() -> None:
    """Give the inputs of the launches back."""
    _inputs.cache_clear()
