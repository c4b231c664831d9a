"""Arguments that the callbacks share."""

from __future__ import annotations

from collections.abc import Callable

from compressm.compression import Schedule
from compressm.errors import bad_argument

ScheduleArgument = Schedule | Callable[[int], Schedule]


def as_schedule(schedule: ScheduleArgument, total_steps: float) -> Schedule:
    """The schedule, or what the function makes of the number of optimizer steps of the whole training.

    Raises:
        ArgumentError: a function, and the number of steps is not known.
    """
    if isinstance(schedule, Schedule):
        return schedule
    if not 0 < total_steps < float("inf"):
        remedy = "Limit the training, or pass a schedule with steps of its own, such as compressm.At([1000])"
        raise bad_argument("schedule", got="a training without end", expected="a number of optimizer steps", remedy=remedy)
    return schedule(int(total_steps))
