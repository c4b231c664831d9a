"""The decode step on a GPU: what is compiled, checked and tuned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from compressm.kernels.core.gpu import Budget, Call, Check, Config, MachineCode, Shape, Tunable, by_target
from compressm.kernels.selective_scan.gpu import types_of
from compressm.kernels.selective_state_update import triton_update
from compressm.kernels.selective_state_update.record import draw

_BUDGETS = (Budget(88, 48, conversions=6), Budget(88, 56, conversions=6))


def machine_code(target: Any) -> Iterator[MachineCode]:
    kernel = triton_update._selective_state_update_kernel
    config = triton_update.config(16) | {
        "FAST": target.backend == "cuda", "SOFTPLUS": True, "enable_fp_fusion": True, "TIED": False, "DENSE": True,
        "num_warps": 128 // target.warp_size,
    }  # fmt: skip
    types = types_of(kernel, "bf16", "state A D bias")
    yield MachineCode(
        "state_update_bf16", kernel, types, config, by_target(target, *_BUDGETS), config["BD"] * config["BN"] // 128
    )


def _sizes(batch: int, channels: int, states: int) -> dict[str, int]:
    return {"batch": batch, "channels": channels, "states": states}


def checks(dtype: torch.dtype) -> Iterator[Check]:
    for states in (1, 12, 13, 100, 128, 300):
        yield Check(_sizes(3, 96, states), {"groups": 3 if states % 2 else 1})
    yield Check(_sizes(128, 2560, 128))


SMOKE = Check(_sizes(1, 3, 5), seen="batch")
SMALL = (Check(_sizes(2, 6, 5)),)
LARGE = (Check(_sizes(8200, 2048, 130), seen="batch"),)


def update(shape: Shape, config: Config | None, device: str) -> Call:
    torch.manual_seed(0)
    p = draw(_sizes(*shape), torch.bfloat16, torch.device(device)).tensors
    one_head = {"state": 1, "x": 1, "dt": 1, "z": 1, "A": 0, "D": 0, "dt_bias": 0}
    p = {name: t.unsqueeze(one_head[name]) if name in one_head else t for name, t in p.items()}
    given: Any = [p[name] for name in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    launch = None
    if config is not None:
        planned = triton_update.config(shape[2])
        launch = planned | {"BD": max(1, config["elements"] // planned["BN"]), "num_warps": config["num_warps"]}
    return lambda: (triton_update.state_update(*given, None, None, True, -1, launch),)


def tunables() -> tuple[Tunable, ...]:
    configs = tuple({"elements": e, "num_warps": w} for e in (256, 512, 1024, 2048) for w in (1, 2, 4, 8))
    shapes = {f"B{b} D2560 N{n}": (b, 2560, n) for b in (128, 1) for n in (128, 16)}
    return (
        Tunable(
            "selective_state_update", triton_update._selective_state_update_kernel, "state_update_bf16", configs, shapes,
            lambda config: (2, 200, 128), update, lambda shape: {"elements": triton_update.ELEMENTS, "num_warps": 4},
            lambda shape: 8 * shape[0] * shape[1] * shape[2], smoke=(1, 3, 4),
        ),
    )  # fmt: skip


def forget() -> None:
    """Nothing is kept between launches."""
