"""Means, paired differences and Holm's correction, against scipy and by hand."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from compressm.experiments.comparing.statistics import estimate, holm, paired

OURS, THEIRS = [0.71, 0.80, 0.64, 0.77, 0.69], [0.65, 0.78, 0.66, 0.70, 0.60]


def test_a_mean_has_the_error_that_its_scatter_says():
    found = estimate([1.0, 2.0, 6.0])
    assert (found.mean, found.count) == (3.0, 3)
    assert math.isclose(found.error, math.sqrt(7 / 3))
    assert estimate([4.0]).error is None


def test_paired_differences_are_those_of_scipy():
    found, oracle = paired(OURS, THEIRS), stats.ttest_rel(OURS, THEIRS)
    interval = oracle.confidence_interval(0.95)
    assert math.isclose(found.p, oracle.pvalue, rel_tol=1e-12)
    assert math.isclose(found.low, interval.low, rel_tol=1e-12)
    assert math.isclose(found.high, interval.high, rel_tol=1e-12)
    other = paired(THEIRS, OURS)
    assert (other.mean, other.low, other.high, other.p) == (-found.mean, -found.high, -found.low, found.p)


def test_paired_differences_by_hand():
    """Differences 1, 2, 3: mean 2, error 1 / sqrt(3), and 4.303 of these to each side with two degrees of freedom."""
    found = paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert math.isclose(found.mean, 2.0)
    assert math.isclose(found.high, 2 + 4.30265 / math.sqrt(3), rel_tol=1e-5)
    assert math.isclose(found.p, 0.074180, rel_tol=1e-4)


def test_pairs_that_leave_nothing_to_estimate_from():
    one = paired([0.9], [0.1])
    assert (one.mean, one.error, one.low, one.high, one.p, one.count) == (0.8, None, None, None, 1.0, 1)
    same = paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same.mean, same.p) == (0.0, 1.0)
    assert paired([0.3, 0.4, 0.5, 0.6], [0.1, 0.2, 0.3, 0.4]).p == 0.125  # the sign test: 2 of 16 outcomes
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0, 2.0], [1.0])


def test_holm_by_hand():
    """0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04, which may not fall below the one before it."""
    for found, expected in zip(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02], strict=True):
        assert math.isclose(found, expected)
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
