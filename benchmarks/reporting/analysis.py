"""What the figures of a run say: ratios to every peer, speed-ups by size, growth with every axis. Pure numbers, no text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from compressm.benchmarking.results import Result, Run

OURS = "compressm"
AXES = ("states", "length", "batch")
CURVE_POINTS = 3  # fewer say nothing about growth


def is_ours(contender: str) -> bool:
    """Whether it is compressm or a variant of it, e.g. ``"compressm, torch.compile"``; all others are peers."""
    return contender == OURS or contender.startswith((f"{OURS} ", f"{OURS},"))


class Spread(NamedTuple):
    """A quotient of two medians, and the least and largest quotient of their 20th and 80th percentiles."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, above: Result, below: Result) -> Spread:
        """Time of one over time of the other."""
        a, b = above.milliseconds, below.milliseconds
        return cls(a.median / b.median, a.low / b.high, a.high / b.low)

    @property
    def verdict(self) -> int:
        """1 where the one above takes longer beyond the spread, -1 where it takes less, 0 where the spreads overlap."""
        return (self.low > 1) - (self.high < 1)


@dataclass(frozen=True)
class Group:
    """The contenders of one computation, ours first."""

    name: str
    results: tuple[Result, ...]

    @property
    def ours(self) -> Result | None:
        """None where ours was wrong, raised or was left out."""
        return next((r for r in self.results if r.contender == OURS), None)

    @property
    def first(self) -> Result:
        return self.results[0]

    def ratios(self) -> dict[str, Spread]:
        """Time of every other contender over ours; empty where ours has none."""
        ours = self.ours
        return {} if ours is None else {r.contender: Spread.of(r, ours) for r in self.results if r is not ours}


def groups(run: Run, keep: Callable[[Result], bool] = lambda _: True) -> list[Group]:
    """The run's groups in its order."""
    found: dict[str, list[Result]] = {}
    for result in run.results:
        if keep(result):
            found.setdefault(result.group, []).append(result)
    return [Group(name, tuple(sorted(each, key=lambda r: r.contender != OURS))) for name, each in found.items()]


def contenders(results: Iterable[Result]) -> list[str]:
    """In order of appearance, ours first."""
    return sorted(dict.fromkeys(r.contender for r in results), key=lambda name: (name != OURS, not is_ours(name)))


def computations(found: Sequence[Group]) -> dict[tuple[str, str, str], list[Group]]:
    """Groups by op, pass and dtype."""
    by: dict[tuple[str, str, str], list[Group]] = {}
    for group in found:
        by.setdefault((group.first.op, group.first.passes, group.first.dtype), []).append(group)
    return by


@dataclass(frozen=True)
class Tally:
    """Comparisons with peers: how often ours takes less time, about the same (the spreads overlap), and more."""

    faster: int
    even: int
    slower: tuple[tuple[Group, str, Spread], ...]

    @property
    def total(self) -> int:
        return self.faster + self.even + len(self.slower)


def tally(found: Iterable[Group]) -> Tally:
    """Over all groups; variants of ours do not count."""
    pairs = [(group, name, s) for group in found for name, s in group.ratios().items() if not is_ours(name)]
    verdicts = [s.verdict for _, _, s in pairs]
    slower = sorted((pair for pair in pairs if pair[2].verdict < 0), key=lambda pair: pair[2].value)
    return Tally(verdicts.count(1), verdicts.count(0), tuple(slower))


def noise(run: Run) -> float | None:
    """Median over all results of how far the 20th and 80th percentile lie apart, over the median time; None without spreads."""
    spreads = [(t.high - t.low) / t.median for t in (r.milliseconds for r in run.results) if t.rounds > 1]
    return statistics.median(spreads) if spreads else None


class Published(NamedTuple):
    """A speed-up that the authors announced, and for how many states; None: as small as they went."""

    factor: float
    words: str
    at: int | None

    def states(self, step: Shrinking) -> int:
        """The size of ours that it stands beside."""
        return step.results[-1].shape["states"] if self.at is None else self.at


PUBLISHED = {
    "scifar": Published(1.5, "up to 1.5x", None),
    "mamba-lm": Published(4.0, "about 4x", 12),
}


class Line(NamedTuple):
    """Time at no states and time per state of the least-squares line through the medians, and its largest relative miss."""

    constant: float
    slope: float
    miss: float


@dataclass(frozen=True)
class Shrinking:
    """One training step at several state sizes, largest first.

    Attributes:
        op, dtype, contender: of all of them.
        results: by falling number of states.
        line: through them; None for fewer than three sizes, through which any line goes.
    """

    op: str
    dtype: str
    contender: str
    results: tuple[Result, ...]
    line: Line | None

    @property
    def published(self) -> Published | None:
        """What was announced for this step, if anything."""
        return PUBLISHED.get(self.op)

    def speed_up(self, result: Result) -> Spread:
        """Time of the full size over that of a smaller one."""
        return Spread.of(self.results[0], result)

    @property
    def independent_share(self) -> float | None:
        """Share of the full step that the line leaves at no states, in [0, 1]; None without a line."""
        if self.line is None:
            return None
        whole = self.line.constant + self.line.slope * self.results[0].shape["states"]
        return min(max(self.line.constant / whole, 0.0), 1.0)

    @property
    def most(self) -> float | None:
        """Speed-up that no states at all would bring by the line; None without one, infinite where nothing would be left."""
        share = self.independent_share
        return None if share is None else (math.inf if share == 0 else 1 / share)


def shrinking_steps(run: Run) -> list[Shrinking]:
    """Every training step that was timed at two or more state sizes, all else equal."""
    found = []
    for curve in curves(run, ("states",), points=2, levels=("step",)):
        results = tuple(reversed(curve.results))
        first = results[0]
        found.append(Shrinking(first.op, first.dtype, first.contender, results, _line(curve) if len(results) > 2 else None))
    return found


def _line(curve: Curve) -> Line | None:
    x, y = np.array(curve.sizes, dtype=float), np.array([r.milliseconds.median for r in curve.results])
    slope, constant = np.polyfit(x, y, 1)
    whole = constant + slope * x[-1]
    return Line(float(constant), float(slope), float(np.max(np.abs(constant + slope * x - y) / y))) if whole > 0 else None


@dataclass(frozen=True)
class Curve:
    """One contender's times along one axis of the shape, all else equal.

    Attributes:
        axis: name in the shape.
        fixed: the rest of the shape.
        results: by rising size, no size twice.
        slope: of log time over log size, least squares: 1 is linear growth, 0 none.
    """

    axis: str
    fixed: dict[str, int]
    results: tuple[Result, ...]

    @property
    def sizes(self) -> list[int]:
        return [r.shape[self.axis] for r in self.results]

    @property
    def slope(self) -> float:
        x = np.log2(np.array(self.sizes, dtype=float))
        y = np.log2([r.milliseconds.median for r in self.results])
        return float(np.polyfit(x, y, 1)[0])


def curves(
    run: Run, axes: Sequence[str] = AXES, *, points: int = CURVE_POINTS, levels: Sequence[str] = ("op", "layer")
) -> list[Curve]:
    """All curves of at least so many points, by op, then axis, in the run's order."""
    found: dict[tuple, dict[int, Result]] = {}
    for result in run.results:
        if result.level not in levels:
            continue
        for axis in axes:
            size = result.shape.get(axis, 0)
            if size > 0:
                rest = tuple(sorted((name, n) for name, n in result.shape.items() if name != axis))
                key = (result.op, axis, result.passes, result.dtype, rest, result.contender)
                found.setdefault(key, {}).setdefault(size, result)
    kept = []
    for (_, axis, _, _, rest, _), by_size in found.items():
        if len(by_size) >= points:
            kept.append(Curve(axis, dict(rest), tuple(by_size[size] for size in sorted(by_size))))
    ops = list(dict.fromkeys(r.op for r in run.results))
    return sorted(kept, key=lambda curve: (ops.index(curve.results[0].op), axes.index(curve.axis)))


def families(found: Sequence[Curve]) -> list[list[Curve]]:
    """Curves of the same computation and axis together, ours first."""
    by: dict[tuple, list[Curve]] = {}
    for curve in found:
        first = curve.results[0]
        by.setdefault((first.op, curve.axis, first.passes, first.dtype, tuple(curve.fixed.items())), []).append(curve)
    return [sorted(each, key=lambda curve: curve.results[0].contender != OURS) for each in by.values()]
