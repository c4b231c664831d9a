"""The rule of the guard: what a reduction may cost, and when that is measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from compressm.compression.planning.schedules import Schedule
from compressm.errors import bad_argument, check_integer, check_number

Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Rollback:
    """Undoes reductions that cost too much, everything included, and tries less; pass it as ``Compressor(..., guard=)``.

    Before a reduction, the model with its buffers, the optimizers, the EMA, the random states of Python, numpy and torch and
    whatever was given to ``Compressor.register`` are put aside.

    1. Right after the cut, ``quick`` may be worse than just before by the fraction ``jump``.  Otherwise everything is put
       back and ranks half-way to the present ones are tried, up to ``tries`` times; then the attempt is refused.
    2. After ``recovery`` more steps of training, ``evaluate`` may be worse by the fraction ``tolerance`` than the best value
       before any reduction: reductions that were accepted do not lower the bar for the next.  (Of a run that was reduced
       without a guard before it was resumed with one: before the first reduction that this watches.)  Otherwise everything is
       put back as it was before the reduction, bit for bit, and the next attempt removes less (``Policy.gentler``: half of
       tau).  It is the next scheduled one, or where none is left comes with the next step.  After ``failures`` rollbacks there
       is none.

    A metric that is NaN or infinite fails.  Metrics run in eval mode without gradients and leave no trace in the model or the
    random states.  In distributed training every process calls them, and rank 0's number decides.

    A registered object that does not take its state back keeps nothing else from it: model, optimizers and counts are those of
    then, and ``Compressor.step`` raises the error.

    After a rollback ``Compressor.step_count`` is what it was at the reduction, and registered schedulers follow; loops should
    count with it: ``while compressor.step_count < total_steps``.

    Args:
        evaluate: ``evaluate(model) -> float``, on validation data; lower is better.
        tolerance: relative, at least 0.
        mode: ``"max"`` where higher is better.
        recovery: a fraction of the schedule's total steps (float), or a number of steps (int).
        quick: a cheaper metric of the same direction for step 1, such as the loss of calibration batches; None: ``evaluate``.
        jump: relative, at least 0; None skips step 1.
        tries: how many raised ranks to try in step 1.
        failures: rollbacks after which no further reduction is attempted.
        disk_bytes: what is put aside goes to temporary files if it is larger than this, else into CPU memory.
        folder: of these files; None: the system's.

    Raises:
        ArgumentError: out of range.
    """

    evaluate: Metric
    tolerance: float = 0.005
    _: KW_ONLY
    mode: str = "min"
    recovery: float | int = 0.01
    quick: Metric | None = None
    jump: float | None = 0.1
    tries: int = 3
    failures: int = 2
    disk_bytes: int = 8 << 30
    folder: str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("evaluate", "quick"):
            value = getattr(self, name)
            if not callable(value) and (name == "evaluate" or value is not None):
                raise bad_argument(name, got=repr(value), expected="a function of the model that returns a number")
        if self.mode not in ("min", "max"):
            raise bad_argument("mode", got=repr(self.mode), expected='"min" or "max"')
        for name in ("tolerance", "jump"):
            value = getattr(self, name)
            if name != "jump" or value is not None:
                check_number(name, value, "a number, at least 0", lambda number: 0 <= number < math.inf)
        fraction = isinstance(self.recovery, float) and 0 < self.recovery < 1
        steps = type(self.recovery) is int and self.recovery >= 1
        if not fraction and not steps:
            expected = "a fraction of training in (0, 1) or a positive number of steps"
            raise bad_argument("recovery", got=repr(self.recovery), expected=expected)
        for name, least in (("tries", 0), ("failures", 1), ("disk_bytes", 0)):
            check_integer(name, getattr(self, name), least, expected=f"an integer, at least {least}")

    @classmethod
    def pragmatic(cls, evaluate: Metric, tolerance: float = 0.0, **options: Any) -> Rollback:
        """The CompreSSM authors' pragmatic mode: go on cutting until the first drop, undo that one and stop.

        They remove 10 % of the states at every attempt: use it with ``policy=Shrink(0.1)`` and a schedule of many attempts.
        Unlike theirs, the bar stays where it was before the first attempt, buffers are restored as well, and the last
        reduction is validated too.

        Args:
            evaluate, tolerance, options: as for the class.
        """
        return cls(evaluate, tolerance, **{"jump": None, "failures": 1, **options})

    def window(self, schedule: Schedule) -> int:
        """Recovery in optimizer steps.

        Raises:
            ArgumentError: it is a fraction and the schedule does not know its total steps, or it does not fit in.
        """
        total = schedule.total_steps
        if isinstance(self.recovery, int):
            window = self.recovery
        elif total is None:
            got = f"{self.recovery}, a fraction of training, with {schedule}, which does not say how long that is"
            remedy = "Pass total_steps to the schedule, or recovery as a number of steps"
            raise bad_argument("recovery", got=got, expected="a number of steps", remedy=remedy)
        else:
            window = max(1, round(self.recovery * total))
        if total is not None and schedule.steps[-1] + window > total:
            got = f"{window} steps after the last attempt at step {schedule.steps[-1]}"
            remedy = "Shorten recovery, or let the schedule end earlier"
            raise bad_argument("recovery", got=got, expected=f"an end before total_steps = {total}", remedy=remedy)
        return window

    def passes(self, value: float, reference: float, tolerance: float) -> bool:
        """Whether a metric is at most ``tolerance * |reference|`` worse than a reference."""
        slack = tolerance * abs(reference)
        good = value <= reference + slack if self.mode == "min" else value >= reference - slack
        return math.isfinite(value) and good

    def better(self, one: float, other: float) -> float:
        """The better of two values."""
        return min(one, other) if self.mode == "min" else max(one, other)
