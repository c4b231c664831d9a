"""The LTI scan on a GPU, where it is matrix products around the diagonal scan's kernels: what is checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from compressm.kernels.core.gpu import Check, MachineCode, Tunable


def machine_code(target: Any) -> Iterator[MachineCode]:
    return iter(())


def _sizes(batch: int, length: int, channels: int, states: int) -> dict[str, int]:
    return {"batch": batch, "length": length, "channels": channels, "states": states}


def checks(dtype: torch.dtype) -> Iterator[Check]:
    if dtype == torch.float32:
        for channels, states in ((8, 256), (8, 28), (64, 256), (512, 93)):
            yield Check(_sizes(4, 784, channels, states))


SMOKE = Check(_sizes(1, 9, 2, 3))
SMALL: tuple[Check, ...] = ()
LARGE: tuple[Check, ...] = ()


def tunables() -> tuple[Tunable, ...]:
    return ()


def forget() -> None:
    """Nothing is kept between launches."""
