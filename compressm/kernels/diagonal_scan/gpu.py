"""The diagonal scan on a GPU: what is compiled, checked and tuned."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from compressm.kernels.core.gpu import FUSION, Budget, Call, Check, Config, MachineCode, Shape, Tunable, by_target
from compressm.kernels.diagonal_scan import triton_scan
from compressm.kernels.diagonal_scan.record import draw

_SCAN = {"L": "i32", "N": "i32", "stretches": "i32", "steps": "i32"}
_FORWARD = dict.fromkeys(("lam", "starts"), "*fp32") | _SCAN
_BACKWARD = dict.fromkeys(("lam", "carries", "start", "grad_lam", "grad_start"), "*fp32") | _SCAN
# Per step of a complex state; Triton 3.6 masks every load with a branch of its own on AMD.
_BUDGETS = {
    "scan_fwd_fp32": (Budget(72, 21), Budget(64, 37)),
    "scan_fwd_bf16": (Budget(72, 26), Budget(64, 47)),
    "scan_ends_bf16": (Budget(72, 17.5), Budget(104, 27)),
    "scan_bwd_fp32": (Budget(88, 35.5), Budget(96, 115)),
    "scan_bwd_bf16": (Budget(88, 44), Budget(96, 130)),
}


def machine_code(target: Any) -> Iterator[MachineCode]:
    forward = triton_scan.FORWARD_CONFIG | {"BN": target.warp_size}
    backward = triton_scan.BACKWARD_CONFIG | {"BN": target.warp_size}

    def case(name: str, kernel: Any, types: dict[str, str], config: Config) -> MachineCode:
        return MachineCode(name, kernel, types, config, by_target(target, *_BUDGETS[name]), config["U"])

    kernel = triton_scan._diagonal_scan_fwd_kernel
    for dtype in ("fp32", "bf16"):
        types = _FORWARD | dict.fromkeys(("x", "h"), f"*{dtype}")
        yield case(f"scan_fwd_{dtype}", kernel, types, forward | {"REVERSE": False, "STORE": True})
    yield case("scan_ends_bf16", kernel, _FORWARD | {"x": "*bf16", "h": "*fp32"}, forward | {"REVERSE": True, "STORE": False})
    kernel = triton_scan._diagonal_scan_bwd_kernel
    for dtype in ("fp32", "bf16"):
        types = _BACKWARD | dict.fromkeys(("grad_h", "h", "grad_x"), f"*{dtype}")
        yield case(f"scan_bwd_{dtype}", kernel, types, backward | {"REVERSE": True})


def _sizes(batch: int, length: int, states: int) -> dict[str, int]:
    return {"batch": batch, "length": length, "states": states}


def checks(dtype: torch.dtype) -> Iterator[Check]:
    for at, states in enumerate((12, 13, 100, 128, 300)):
        for length in (1, 33, 257, 2000, 2048):
            if dtype == torch.float32 or (at + length) % 3 == 0:
                yield Check(_sizes(3, length, states), {"reverse": bool(at % 2), "states": length % 2 == 1})
    yield Check(_sizes(1, 20_000, 5), {"fastest": 0.5})  # in stretches
    yield Check(_sizes(50, 1024, 384))


_FORGETS = {"states": False}  # the last steps do not remember the first ones, as no modulus is near one
SMOKE = Check(_sizes(2, 70, 3), _FORGETS, "time", 64, 2048)
SMALL = (Check(_sizes(1, 9, 5)),)
LARGE = (
    Check(_sizes(520, 2048, 1024), seen="batch"),
    Check(_sizes(1, 1_050_000, 1024), _FORGETS, "time", 64, 2048),
)


@functools.lru_cache(maxsize=1)
def _inputs(shape: Shape, device: str) -> tuple[Tensor, ...]:
    batch, length, states, word = shape
    torch.manual_seed(0)
    dtype = torch.float32 if word == 4 else torch.bfloat16
    return tuple(draw(_sizes(batch, length, states), dtype, torch.device(device)).tensors.values())


def _split_off(config: Config | None) -> dict[str, Any]:
    """Keyword arguments of the launches: the launch configuration and the number of stretches."""
    if config is None:
        return {}
    launch = {key: value for key, value in config.items() if key != "stretches"}
    return {"config": launch, "stretches": config.get("stretches")}


def forward(shape: Shape, config: Config | None, device: str) -> Call:
    x, decay, phase, start = _inputs(shape, device)
    options = _split_off(config)
    return lambda: (triton_scan.diagonal_scan_forward(x, decay, phase, start, False, **options),)


def backward(shape: Shape, config: Config | None, device: str) -> Call:
    x, decay, phase, start = _inputs(shape, device)
    h = triton_scan.diagonal_scan_forward(x, decay, phase, start, False)
    options = _split_off(config)
    return lambda: triton_scan.diagonal_scan_backward(x, h, decay, phase, start, False, **options)


def tunables() -> tuple[Tunable, ...]:
    lanes = tuple({"BN": 32 * warps, "num_warps": warps, **FUSION} for warps in (1, 2, 4))
    forwards = tuple({**few, "U": U} for few in lanes for U in (8, 16, 24))
    stretched = tuple({**lanes[0], "U": 16, "stretches": n} for n in (1, 2, 8, 16, 32))
    backwards = tuple({**few, "U": U} for few in lanes for U in (4, 8, 16))
    shapes = {"B50 L1024 N384 fp32": (50, 1024, 384, 4), "B50 L1024 N93 bf16": (50, 1024, 93, 2),
              "B50 L784 N28 fp32": (50, 784, 28, 4), "B4 L8192 N64 fp32": (4, 8192, 64, 4)}  # fmt: skip

    def least(passes: int) -> Any:
        return lambda shape: passes * shape[0] * shape[1] * 2 * shape[2] * shape[3]

    return (
        Tunable(
            "diagonal_scan forward", triton_scan._diagonal_scan_fwd_kernel, "scan_fwd_fp32", forwards + stretched, shapes,
            lambda config: (2, 600, 40, 4), forward, lambda shape: triton_scan.FORWARD_CONFIG, least(2),
            profiled=(50, 1024, 384, 4),
        ),
        Tunable(
            "diagonal_scan backward", triton_scan._diagonal_scan_bwd_kernel, "scan_bwd_fp32", backwards, shapes,
            lambda config: (2, 600, 40, 4), backward, lambda shape: triton_scan.BACKWARD_CONFIG, least(3),
            smoke=(1, 5, 3, 4), profiled=(50, 1024, 384, 4),
        ),
    )  # fmt: skip


def forget() -> None:
    """Give the inputs of the launches back."""
    _inputs.cache_clear()
