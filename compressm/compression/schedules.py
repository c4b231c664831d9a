"""When a reduction is attempted, in optimizer steps counted from 1."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from compressm.errors import bad_argument


class Schedule(ABC):
    """A finite set of optimizer steps.  Frozen and pure."""

    @property
    @abstractmethod
    def steps(self) -> tuple[int, ...]:
        """The steps after which a reduction is attempted: ascending, distinct, each at least 1."""

    @property
    def attempts(self) -> int:
        """Number of attempts."""
        return len(self.steps)

    def due(self, step: int) -> bool:
        """Whether a reduction is attempted after optimizer step ``step``."""
        return step in self.steps


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
        _check_steps("total_steps", self.total_steps)
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
        _check_steps("total_steps", self.total_steps)
        _check_fraction("fraction", self.fraction)
        _check_steps("attempts", self.attempts)
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
    """

    interval: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        for name in ("interval", "start", "stop"):
            _check_steps(name, getattr(self, name))
        if self.stop < self.start:
            raise bad_argument("stop", got=self.stop, expected=f"at least start = {self.start}")

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(range(self.start, self.stop + 1, self.interval))

    def due(self, step: int) -> bool:
        return self.start <= step <= self.stop and (step - self.start) % self.interval == 0


@dataclass(frozen=True)
class At(Schedule):
    """Attempts at the given steps.

    Args:
        at: distinct positive step numbers, in any order.
    """

    at: tuple[int, ...]

    def __init__(self, at: Iterable[int]) -> None:
        if isinstance(at, int) or not isinstance(at, Iterable):
            raise bad_argument("At", got=repr(at), expected="a sequence of step numbers, such as At([500, 1000])")
        listed = list(at)
        for value in listed:
            _check_steps("At", value)
        if not listed or len(set(listed)) != len(listed):
            raise bad_argument("At", got=listed, expected="at least one step number, each once")
        object.__setattr__(self, "at", tuple(sorted(listed)))

    @property
    def steps(self) -> tuple[int, ...]:
        return self.at


def _check_steps(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise bad_argument(name, got=repr(value), expected="a positive integer")


def _check_fraction(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise bad_argument(name, got=repr(value), expected="a number in (0, 1]")
