"""The Gramians on a GPU: what is compiled, checked and tuned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from compressm.kernels.core.gpu import FUSION, Budget, Call, Check, Config, MachineCode, Shape, Tunable, by_target
from compressm.kernels.gramians import triton_gramians
from compressm.kernels.gramians.op import gramians
from compressm.kernels.gramians.record import draw

_TYPES = {
    "work": "*i64", "systems": "*i64", "spectra": "*fp64", "features": "*fp64", "out": "*fp64", "states": "i32", "plane": "i32",
}  # fmt: skip


def machine_code(target: Any) -> Iterator[MachineCode]:
    """Per (i, j, k) of a Gramian."""
    config = triton_gramians.CONFIG | {"num_warps": triton_gramians.TILE**2 // target.warp_size}
    budget = by_target(target, Budget(72, 20), Budget(128, 55))
    yield MachineCode("gramians", triton_gramians._gramians_kernel, _TYPES, config, budget)


def _sizes(batch: int, states: int, channels: int) -> dict[str, int]:
    return {"batch": batch, "states": states, "channels": channels}


def checks(dtype: torch.dtype) -> Iterator[Check]:
    for states in (1, 5, 12, 13, 100, 128, 300):
        yield Check(_sizes(2, states, 8))
    yield Check(_sizes(6, 384, 512))


SMOKE = Check(_sizes(1, 3, 2), seen="batch")
SMALL = (Check(_sizes(1, 5, 2)),)
LARGE = (Check(_sizes(1900, 384, 2), seen="batch"),)


def _system(shape: Shape, device: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return draw(_sizes(*shape), torch.float64, torch.device(device)).tensors


def launch(shape: Shape, config: Config | None, device: str) -> Call:
    system: Any = tuple(_system(shape, device).values())
    return lambda: triton_gramians.gramian_quads([system], config or triton_gramians.CONFIG)[0]


def _of_torch(shape: Shape, device: str) -> Callable[[], object]:
    system = _system(shape, device)
    return lambda: gramians(**system, backend="torch")


def tunables() -> tuple[Tunable, ...]:
    configs = tuple({"T": T, "num_warps": w, **FUSION} for T, w in ((8, 2), (16, 4), (16, 8), (32, 8)))
    return (
        Tunable(
            "gramians", triton_gramians._gramians_kernel, "gramians", configs, {"6 systems, N384 H512": (6, 384, 512)},
            lambda config: (2, 40, 3), launch, lambda shape: triton_gramians.CONFIG,
            lambda shape: 64 * shape[0] * shape[1] ** 2, smoke=(1, 3, 2), rivals={"torch": _of_torch}, graph=False,
        ),
    )  # fmt: skip


def forget() -> None:
    """Nothing is kept between launches."""
