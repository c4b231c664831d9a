"""The learning rate after a cut: of optimizers, and of the schedulers that set it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from compressm.compression.planning.schedules import ScheduleWarning
from compressm.compression.surgery.audit import Optimizers
from compressm.errors import check_number


def check_factor(factor: Any) -> float | None:
    """The factor, if it is a positive number or None; ArgumentError otherwise."""
    if factor is not None:
        expected = "a positive number, a factor on the learning rate, or None"
        check_number("lr_after", factor, expected, lambda number: 0 < number < math.inf)
    return factor


def multiply_rates(optimizers: Optimizers, registered: Iterable[Any], factor: float | None) -> str:
    """Multiply the learning rates of all parameter groups, and what registered schedulers remember of them.

    Args:
        optimizers: those that train the model.
        registered: objects, of which those with ``base_lrs`` are schedulers; schedulers inside of them are found.
        factor: positive; None: they stay.

    Returns:
        what was done, in words.

    Warns:
        ScheduleWarning: a scheduler has left its mark on a group and none is registered: it will set its own rate again.
    """
    if factor is None:
        return ""
    schedulers = [item for root in registered for item in _schedulers(root)]
    for scheduler in schedulers:
        for name in ("base_lrs", "_last_lr"):
            if isinstance(values := vars(scheduler).get(name), list):
                values[:] = [value * factor for value in values]
    scheduled = False
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            scheduled |= "initial_lr" in group
            for name in ("lr", "initial_lr"):
                if isinstance(value := group.get(name), Tensor):
                    value.mul_(factor)  # captured graphs read this very tensor
                elif value is not None:
                    group[name] = value * factor
    if scheduled and not schedulers:
        warnings.warn(
            "lr_after: a scheduler that the Compressor does not know sets the learning rate, and will set its own again. "
            "Call compressor.register(scheduler=scheduler)",
            ScheduleWarning,
            stacklevel=5,
        )
    return f"learning rate x{factor:g}"


def _schedulers(item: Any) -> Iterator[Any]:
    """A scheduler and those that it is made of."""
    own = getattr(item, "__dict__", {})
    if "base_lrs" in own:
        yield item
    for inner in own.get("_schedulers", ()):
        yield from _schedulers(inner)
