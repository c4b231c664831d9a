"""When a reduction is attempted, in optimizer steps counted from 1."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from compressm.errors import bad_argument, check_integer, check_number


class ScheduleWarning(UserWarning):
    """Reductions that were scheduled have not happened, or will not happen when they should."""


@dataclass(frozen=True)
class Look:
    """What an adaptive schedule sees at one of its steps.

    Attributes:
        step: optimizer steps so far.
        spectra: Hankel singular values of every layer, descending.
        kept: the states of every layer that a reduction would keep now, as indices of its present states.
        lr: learning rate now, the largest of all parameter groups.
        attempts: attempts so far.
    """

    step: int
    spectra: Mapping[str, Sequence[float]]
    kept: Mapping[str, Sequence[int]]
    lr: float
    attempts: int


class Schedule(ABC):
    """A finite set of optimizer steps.  Frozen and pure.

    Attributes:
        total_steps: optimizer steps of the whole training; None: not known.
        adaptive: only one reduction is made, at the first of the steps where :meth:`decide` agrees.
    """

    total_steps: int | None = None
    adaptive = False

    @property
    @abstractmethod
    def steps(self) -> tuple[int, ...]:
        """The steps after which a reduction is attempted: ascending, distinct, each at least 1."""

    @property
    def attempts(self) -> int:
        """Number of attempts."""
        return 1 if self.adaptive else len(self.steps)

    def due(self, step: int) -> bool:
        """Whether a reduction is attempted (adaptive: considered) after optimizer step ``step``."""
        return step in self.steps

    def after(self, step: int) -> int | None:
        """The first step after ``step`` at which a reduction may be attempted."""
        return next((due for due in self.steps if due > step), None)

    def warn_missed(self, step: int, *, waiting: bool) -> None:
        """Warn, in the name of the caller's caller, if training ends at a step with attempts to come, or one that waits."""
        if missed := [step + 1] * waiting + [due for due in self.steps if due > step]:
            warnings.warn(
                f"training ended at step {step}, before the reductions scheduled at {missed}; shorten the schedule "
                "(its total_steps) or train longer",
                ScheduleWarning,
                stacklevel=3,
            )

    def decide(self, look: Look, memory: Any) -> tuple[bool, Any]:
        """For adaptive schedules: whether to attempt a reduction now, and what to remember until the next step.

        Args:
            look: the spectra now.
            memory: what the last call returned, a JSON tree that the Compressor keeps; None at first.
        """
        return True, memory


@dataclass(frozen=True)
class Once(Schedule):
    """One attempt at the fraction ``at`` of training.

    Args:
        total_steps: optimizer steps of the whole training.
        at: in (0, 1]; between 0.1 and 0.3 is what we have measured to be good.
    """

    total_steps: int
    at: float = 0.2

    def __post_init__(self) -> None:
        check_integer("total_steps", self.total_steps)
        _check_fraction("at", self.at)

    @property
    def steps(self) -> tuple[int, ...]:
        return (max(1, round(self.total_steps * self.at)),)


@dataclass(frozen=True)
class Warmup(Schedule):
    """Evenly spaced attempts in the first part of training; the last one at its end (the CompreSSM paper: 4 in 10 %).

    Args:
        total_steps: optimizer steps of the whole training.
        fraction: the first part, in (0, 1].
        attempts: how many.
    """

    total_steps: int
    fraction: float = 0.1
    attempts: int = 4

    def __post_init__(self) -> None:
        check_integer("total_steps", self.total_steps)
        _check_fraction("fraction", self.fraction)
        check_integer("attempts", self.attempts)
        if self.total_steps * self.fraction < self.attempts - 1e-9:
            got = f"{self.attempts} attempts in {self.total_steps * self.fraction:g} steps"
            remedy = "Train longer, raise fraction or lower attempts"
            raise bad_argument("attempts", got=got, expected="at least one step per attempt", remedy=remedy)

    @property
    def steps(self) -> tuple[int, ...]:
        end = self.total_steps * self.fraction
        return tuple(int(end * i / self.attempts + 1e-9) for i in range(1, self.attempts + 1))


@dataclass(frozen=True)
class Every(Schedule):
    """An attempt every ``interval`` steps: at start, start + interval, ..., up to and including stop.

    Args:
        interval: steps between attempts.
        start: first attempt, at least 1.
        stop: no attempt after this step.
        total_steps: optimizer steps of the whole training, if it shall be checked that the attempts fall into it.
    """

    interval: int
    start: int
    stop: int
    total_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("interval", "start", "stop"):
            check_integer(name, getattr(self, name))
        if self.stop < self.start:
            raise bad_argument("stop", got=self.stop, expected=f"at least start = {self.start}")
        _check_within((self.start,), self.total_steps)

    @property
    def _last(self) -> int:
        return self.stop if self.total_steps is None else min(self.stop, self.total_steps)

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(range(self.start, self._last + 1, self.interval))

    def due(self, step: int) -> bool:
        return self.start <= step <= self._last and (step - self.start) % self.interval == 0


@dataclass(frozen=True)
class At(Schedule):
    """Attempts at the given steps.

    Args:
        at: distinct positive step numbers, in any order.
        total_steps: optimizer steps of the whole training, if it shall be checked that the attempts fall into it.
    """

    at: tuple[int, ...]
    total_steps: int | None = None

    def __init__(self, at: Iterable[int], total_steps: int | None = None) -> None:
        if isinstance(at, int) or not isinstance(at, Iterable):
            raise bad_argument("At", got=repr(at), expected="a sequence of step numbers, such as At([500, 1000])")
        listed = list(at)
        for value in listed:
            check_integer("At", value)
        if not listed or len(set(listed)) != len(listed):
            raise bad_argument("At", got=listed, expected="at least one step number, each once")
        _check_within(listed, total_steps)
        object.__setattr__(self, "at", tuple(sorted(listed)))
        object.__setattr__(self, "total_steps", total_steps)

    @property
    def steps(self) -> tuple[int, ...]:
        return self.at


@dataclass(frozen=True)
class WhenStable(Schedule):
    """One reduction, as soon as the Hankel spectrum has settled.

    After the learning rate's warm-up, the spectra are looked at every ``check * total_steps`` steps.  The reduction is
    attempted when at two checks in a row, against the check before, in every layer

    * no singular value moved by more than ``drift`` times the largest one, scaled from the mean learning rate since then to
      the highest seen so far, and
    * fewer than ``change`` of the states that would be kept were exchanged,

    or at ``force * total_steps`` at the latest.  Where that attempt reduced nothing (the policy or the guard declined), checks
    go on until ``until * total_steps``.  A check costs one analysis, calibration included.

    While the learning rate rises nothing moves yet and every spectrum looks settled: a check at which it is higher than at
    any check before never counts.

    Args:
        total_steps: optimizer steps of the whole training.
        check: fraction of training between checks.
        until: no check after this fraction.
        force: an attempt is made at this fraction if there was none before.
        warmup: fraction of training during which the learning rate rises, without checks.
        drift, change: see above.
        patience: how many settled checks in a row it takes.

    Raises:
        ArgumentError: out of range, or too few checks for the spectrum ever to be found settled.
    """

    total_steps: int
    _: KW_ONLY
    check: float = 0.025
    until: float = 0.5
    force: float = 0.3
    warmup: float = 0.0
    drift: float = 0.05
    change: float = 0.1
    patience: int = 2
    _steps: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _forced: int = field(init=False, repr=False, compare=False)

    adaptive = True

    def __post_init__(self) -> None:
        check_integer("total_steps", self.total_steps)
        check_integer("patience", self.patience)
        for name in ("check", "until", "force", "drift", "change"):
            _check_fraction(name, getattr(self, name))
        check_number("warmup", self.warmup, "a number in [0, 1)", lambda number: 0 <= number < 1)
        if not self.warmup < self.force <= self.until:
            expected = f"more than warmup = {self.warmup} and at most until = {self.until}"
            raise bad_argument("force", got=self.force, expected=expected)
        total, interval = self.total_steps, self.check * self.total_steps
        first, last, forced = self.warmup * total, int(self.until * total + 1e-9), max(1, round(self.force * total))
        count = int((last - first) / interval + 1e-9)
        steps = {round(first + i * interval) for i in range(1, count + 1)}
        early = sum(1 <= step < forced for step in steps)
        if early <= self.patience:
            remedy = "Lower check or warmup, raise force, or use Once"
            expected = f"more than patience = {self.patience} checks between warmup and force (step {forced})"
            raise bad_argument("check", got=f"{early} checks", expected=expected, remedy=remedy)
        object.__setattr__(self, "_steps", tuple(sorted(steps | {forced})))
        object.__setattr__(self, "_forced", forced)

    @property
    def steps(self) -> tuple[int, ...]:
        """All checks, and the step at which an attempt is forced."""
        return self._steps

    def decide(self, look: Look, memory: Any) -> tuple[bool, Any]:
        """Compare with the last check."""
        quiet, peak = 0, look.lr
        if memory is not None:
            peak = max(look.lr, memory["peak"])
            settled = look.lr <= memory["peak"] and self._settled(look, memory, peak)
            quiet = memory["quiet"] + 1 if settled else 0
        spectra = {name: [float(value) for value in values] for name, values in look.spectra.items()}
        kept = {name: [int(state) for state in states] for name, states in look.kept.items()}
        remembered = {"quiet": quiet, "peak": peak, "lr": look.lr, "spectra": spectra, "kept": kept}
        forced = look.step >= self._forced and look.attempts == 0
        return forced or quiet >= self.patience, remembered

    def _settled(self, look: Look, memory: Any, peak: float) -> bool:
        mean = (look.lr + memory["lr"]) / 2
        scale = peak / mean if mean > 0 else 1.0
        for name, values in look.spectra.items():
            before = memory["spectra"][name]
            if len(before) != len(values):
                return False
            moved = max(abs(new - old) for new, old in zip(values, before, strict=True))
            if not moved * scale < self.drift * values[0]:
                return False
            states, old = set(look.kept[name]), set(memory["kept"][name])
            most = max(len(states), len(old))
            if not most - len(states & old) < self.change * most:
                return False
        return True


@dataclass(frozen=True)
class Watch(Schedule):
    """No reduction: spectra are measured every ``check * total_steps`` steps, for :meth:`compressm.Compressor.stability`.

    Args:
        total_steps: optimizer steps of the whole training.
        check: fraction of training between measurements.
    """

    total_steps: int
    check: float = 0.05

    adaptive = True

    def __post_init__(self) -> None:
        check_integer("total_steps", self.total_steps)
        _check_fraction("check", self.check)

    @property
    def steps(self) -> tuple[int, ...]:
        count = int(1 / self.check + 1e-9)
        return tuple(sorted({max(1, round(i * self.check * self.total_steps)) for i in range(1, count + 1)}))

    def decide(self, look: Look, memory: Any) -> tuple[bool, Any]:
        """Never."""
        return False, None


def _check_within(steps: Sequence[int], total_steps: int | None) -> None:
    """Raise ArgumentError if an attempt lies beyond the end of training, where it would never come."""
    if total_steps is None:
        return
    check_integer("total_steps", total_steps)
    if beyond := sorted(step for step in steps if step > total_steps):
        raise bad_argument("schedule", got=f"attempts at {beyond}", expected=f"none after total_steps = {total_steps}")


def _check_fraction(name: str, value: object) -> None:
    check_number(name, value, "a number in (0, 1]", lambda number: 0 < number <= 1)
