"""The decode step of the gated delta rule on a GPU: what is compiled, checked and tuned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from compressm.kernels.core.gpu import Budget, Call, Check, Config, MachineCode, Shape, Tunable, by_target
from compressm.kernels.gated_delta_rule_update import triton_update
from compressm.kernels.gated_delta_rule_update.record import draw

_BUDGETS = (Budget(96, 24, conversions=11), Budget(88, 22, conversions=11))
_TYPES = dict.fromkeys(("heads", "own", "K", "V", "state_b", "state_h", "state_k", "state_v"), "i32") | {
    "state": "*fp32", "scale": "fp32", "eps": "fp32",
}  # fmt: skip


def types_of(kernel: Any) -> dict[str, str]:
    """Types of the arguments of the kernel, for inputs in bfloat16."""
    return {name: _TYPES.get(name, "*bf16") for name in kernel.arg_names}


def machine_code(target: Any) -> Iterator[MachineCode]:
    kernel = triton_update._gated_delta_rule_update_kernel
    config: Config = {"rows": None, "CHANNELWISE": False, "UNIT": True, "DENSE": True}
    config |= triton_update.config(128, target.warp_size)
    budget = by_target(target, *_BUDGETS)
    yield MachineCode("delta_update_bf16", kernel, types_of(kernel), config, budget, config["BK"] * config["BV"] // 128)


def _sizes(batch: int, groups: int, heads: int, keys: int, values: int) -> dict[str, int]:
    return {"batch": batch, "groups": groups, "heads": heads, "states": keys, "channels": values}


def checks(dtype: torch.dtype) -> Iterator[Check]:
    for keys in (1, 12, 13, 100, 128, 300):
        yield Check(_sizes(3, 2, 4, keys, 70), {"channelwise": bool(keys % 2)})
    yield Check(_sizes(64, 16, 32, 128, 128))


SMOKE = Check(_sizes(1, 1, 2, 3, 5), seen="batch")
SMALL = (Check(_sizes(2, 1, 2, 5, 6)),)
LARGE = (Check(_sizes(4200, 16, 32, 128, 128), seen="batch"),)


def update(shape: Shape, config: Config | None, device: str) -> Call:
    torch.manual_seed(0)
    p = draw(_sizes(*shape), torch.bfloat16, torch.device(device)).tensors
    given: Any = [p[name] for name in ("state", "q", "k", "v", "g", "beta")]
    launch = None
    if config is not None:
        planned = triton_update.config(shape[3])
        launch = planned | {"BV": max(8, config["elements"] // planned["BK"]), "num_warps": config["num_warps"]}
    return lambda: (triton_update.step(*given, None, None, 1.0, True, -1, launch),)


def tunables() -> tuple[Tunable, ...]:
    configs = tuple({"elements": e, "num_warps": w} for e in (1024, 2048, 4096, 8192) for w in (1, 2, 4, 8))
    shapes = {f"B{b} H16 HV32 K{k} V128": (b, 16, 32, k, 128) for b in (64, 1) for k in (128, 32)}
    return (
        Tunable(
            "gated_delta_rule_update", triton_update._gated_delta_rule_update_kernel, "delta_update_bf16", configs, shapes,
            lambda config: (2, 1, 2, 100, 70), update, lambda shape: {"elements": triton_update.ELEMENTS, "num_warps": 4},
            lambda shape: 8 * shape[0] * shape[2] * shape[3] * shape[4],
        ),
    )  # fmt: skip


def forget() -> None:
    """Nothing is kept between launches."""
