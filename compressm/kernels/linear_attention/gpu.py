"""Linear attention on a GPU: what is compiled, checked and tuned.  Where heads have one decay it runs Mamba-2's kernels."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from compressm.kernels.core.gpu import BOUNDS, Budget, Call, Check, Config, MachineCode, Shape, Tunable, machine_code_of
from compressm.kernels.gated_delta_rule import gpu as delta
from compressm.kernels.gated_delta_rule import triton_backward, triton_call, triton_forward
from compressm.kernels.linear_attention import triton_launch
from compressm.kernels.linear_attention.op import default_scale
from compressm.kernels.linear_attention.record import draw

# For CUDA, for ROCm and for sm_90, per number of v a lane in a turn of the loop over chunks.
_BUDGETS = {
    "linear_states_bf16": (Budget(88, 32, 0, 5), Budget(96, 27, 0, 3), Budget(88, 15, 0, 4)),
    "linear_reverse_bf16": (Budget(255, 54, 24, 7), Budget(176, 46, 0, 4), Budget(160, 27, 0, 6)),
}
_NOTHING_ERASED = dict.fromkeys(("k", "rows", "inverse"))


def machine_code(target: Any) -> Iterator[MachineCode]:
    """The walks between chunks where nothing is erased; what is within chunks is compiled as the gated delta rule's."""
    settings = triton_call.config_of(64, 128, True)
    if target.backend == "hip":
        settings["stages"] = 1
    launch = {name: settings[name] for name in ("T", "BK", "BP")} | triton_call.launch_options(settings, target.warp_size)
    launch |= {"WIDE": True, "WIDE_K": True, "DECAYS": "channel", "PRECISION": "ieee"} | _NOTHING_ERASED
    launch |= dict.fromkeys(("firsts", "ends", "starts", "counts"))
    case = machine_code_of(target, delta.types_of, _BUDGETS)
    for name, kernel in (
        ("linear_states_bf16", triton_forward._delta_states_kernel),
        ("linear_reverse_bf16", triton_backward._delta_reverse_kernel),
    ):
        yield case(name, kernel, "bf16", launch, settings["T"] * settings["BP"] // settings["threads"])


def _sizes(batch: int, length: int, key_heads: int, heads: int, keys: int, values: int) -> dict[str, int]:
    return {
        "batch": batch, "length": length, "key_heads": key_heads, "heads": heads, "keys": keys, "values": values,
    }  # fmt: skip


_STATES = {"states": True}


def checks(dtype: torch.dtype) -> Iterator[Check]:
    """In half precision not of few steps."""
    for at, keys in enumerate((12, 13, 100, 128, 300)):
        for length in (1, 33, 257, 2000):
            if dtype == torch.float32 or (length > 33 and (at + length) % 3 == 0):
                values, groups = (64, 6) if (at + length) % 2 else (20, 3)
                variant = {**_STATES, "decay": "scalar" if at == 3 else "channel"}
                yield Check(_sizes(2, length, groups, 6, keys, values), variant)
    yield Check(_sizes(1, BOUNDS[-1], 3, 6, 13, 64), {**_STATES, "bounds": BOUNDS})
    yield Check(_sizes(8, 2048, 1, 4, 64, 128), _STATES, "heads", 1)


SMOKE = Check(_sizes(1, 9, 1, 2, 3, 2), _STATES, "heads", 1)
SMALL = (Check(_sizes(1, 70, 1, 2, 16, 5), _STATES), Check(_sizes(1, 20, 1, 2, 3, 5), {**_STATES, "bounds": [0, 3, 3, 20]}))
LARGE = (Check(_sizes(300, 2048, 32, 32, 16, 128), _STATES, "batch"),)


@functools.lru_cache(maxsize=1)
def _inputs(shape: Shape, device: str) -> tuple[Any, ...]:
    """Arguments of the launches, of a shape (batch, L, H, HV, K, V)."""
    torch.manual_seed(0)
    p = draw(_sizes(*shape), torch.bfloat16, torch.device(device)).tensors
    return (*(p[name] for name in ("q", "k", "v", "g")), None, None, default_scale(shape[4]))


def _planned(shape: Shape) -> Config:
    return triton_call.config_of(shape[4], shape[5], True)


def forward(shape: Shape, config: Config | None, device: str) -> Call:
    arguments = _inputs(shape, device)
    return lambda: triton_launch.forward(*arguments, config)


def tunables() -> tuple[Tunable, ...]:
    shapes = {"B8 L2048 H4 K64 V128": (8, 2048, 4, 4, 64, 128), "B8 L2048 H4 K16 V128": (8, 2048, 4, 4, 16, 128)}
    base = _planned((8, 2048, 4, 4, 64, 128))
    configs = tuple(base | {"T": T, "BP": BP, "threads": 4 * T} for T in (32, 64) for BP in (16, 32, 64))

    def least(shape: Shape) -> int:
        batch, length, groups, heads, keys, values = shape
        return 2 * batch * length * (heads * (2 * values + keys) + 2 * groups * keys)

    return (
        Tunable(
            "linear_attention forward", triton_forward._delta_states_kernel, "linear_states_bf16", configs, shapes,
            lambda config: (1, config["T"] + 8, 1, 1, 40, config["BP"]), forward, _planned, least,
            profiled=(8, 2048, 4, 4, 64, 128),
        ),
    )  # fmt: skip


def forget() -> None:
    """Give the inputs of the launches back."""
    _inputs.cache_clear()
