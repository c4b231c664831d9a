"""Means, paired differences, and the correction for having asked several questions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

LEVEL = 0.95  # of intervals; what is left of it is the error that verdicts allow, over all of them together


def mean_of_all(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error.

    Attributes:
        mean: of the values.
        error: standard error of the mean; None of a single value.
        count: of the values.
    """

    mean: float
    error: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """What pairs of values say of the difference behind them.

    Attributes:
        mean: of the differences.
        error: standard error of the mean; None of a single pair.
        low, high: t-interval of the mean; None of a single pair.
        p: of the paired t-test, two-sided; 1 of a single pair, which says nothing.
        count: pairs.
    """

    mean: float
    error: float | None
    low: float | None
    high: float | None
    p: float
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of at least one value."""
    count = len(values)
    error = statistics.stdev(values) / math.sqrt(count) if count > 1 else None
    return Estimate(statistics.fmean(values), error, count)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Ours minus theirs, pair by pair; at least one pair.

    Differences that are all the same leave nothing to estimate their scatter from.  Then the sign test stands in for the
    t-test: so many differences of one sign have probability 2^(1 - count), and where all are zero there is no difference.
    """
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    found = estimate(gaps)
    if found.error is None:
        return Difference(found.mean, None, None, None, 1.0, 1)
    if found.error <= 1e-12 * abs(found.mean):
        p = 2.0 ** (1 - found.count) if found.mean else 1.0
        return Difference(found.mean, 0.0, found.mean, found.mean, p, found.count)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, found.count - 1)) * found.error
    p = 2 * float(stats.t.sf(abs(found.mean) / found.error, found.count - 1))
    return Difference(found.mean, found.error, found.mean - half, found.mean + half, p, found.count)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in the order given (Holm, Scand. J. Statist. 6, 1979).

    Whoever rejects what falls below a level wrongly rejects anything at all with at most that probability, however the
    questions depend on each other.
    """
    order = sorted(range(len(ps)), key=ps.__getitem__)
    corrected, largest = [0.0] * len(ps), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[index]))
        corrected[index] = largest
    return corrected
