"""The decode step of linear attention on a GPU: what is compiled, checked and tuned.  It runs the gated delta rule's kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from compressm.kernels.core.gpu import Budget, Check, Config, MachineCode, Tunable, by_target
from compressm.kernels.gated_delta_rule_update import gpu as delta
from compressm.kernels.gated_delta_rule_update import triton_update

_BUDGETS = (Budget(128, 40, conversions=6), Budget(120, 44, conversions=6))


def machine_code(target: Any) -> Iterator[MachineCode]:
    kernel = triton_update._gated_delta_rule_update_kernel
    config: Config = {"rows": None, "beta": None, "CHANNELWISE": True, "UNIT": False, "DENSE": True}
    config |= triton_update.config(64, target.warp_size)
    types = delta.types_of(kernel) | dict.fromkeys(("v", "out"), "*fp32")
    elements = config["BK"] * config["BV"] // 128
    yield MachineCode("linear_update_bf16", kernel, types, config, by_target(target, *_BUDGETS), elements)


def _sizes(batch: int, key_heads: int, heads: int, keys: int, values: int) -> dict[str, int]:
    return {"batch": batch, "key_heads": key_heads, "heads": heads, "keys": keys, "values": values}


def checks(dtype: torch.dtype) -> Iterator[Check]:
    for keys in (1, 12, 13, 100, 128, 300):
        yield Check(_sizes(3, 2, 4, keys, 70), {"channelwise": bool(keys % 2)})
    yield Check(_sizes(64, 4, 4, 64, 128))


SMOKE = Check(_sizes(1, 1, 2, 3, 5), seen="batch")
SMALL = (Check(_sizes(2, 1, 2, 5, 6)),)
LARGE = (Check(_sizes(4200, 16, 32, 128, 128), seen="batch"),)


def tunables() -> tuple[Tunable, ...]:
    """None: the tile is tuned as the gated delta rule's."""
    return ()


def forget() -> None:
    """Nothing is kept between launches."""
