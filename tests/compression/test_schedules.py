"""When a reduction is attempted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressm.compression import At, Every, Once, Schedule, Warmup
from compressm.errors import ArgumentError

steps = st.integers(1, 5000)
schedules = st.one_of(
    st.builds(Once, steps, st.floats(1e-6, 1)),
    st.builds(lambda total, attempts: Warmup(total * attempts, 1.0, attempts), steps, st.integers(1, 9)),
    st.builds(lambda i, start, more: Every(i, start, start + more), steps, steps, st.integers(0, 300)),
    st.builds(At, st.lists(steps, min_size=1, max_size=9, unique=True)),
)


@given(schedules)
def test_steps_are_what_due_says(schedule: Schedule):
    listed = schedule.steps
    assert listed == tuple(sorted(set(listed)))
    assert listed[0] >= 1
    assert schedule.attempts == len(listed)
    window = range(max(0, listed[0] - 3), min(listed[-1], listed[0] + 2000) + 4)
    assert [step for step in window if schedule.due(step)] == [step for step in listed if step in window]
    assert not schedule.due(0)


@given(st.integers(1, 100_000), st.floats(1e-3, 1), st.integers(1, 50))
def test_warmup_is_even_and_ends_with_its_fraction(total, fraction, attempts):
    if total * fraction < attempts - 1e-9:
        with pytest.raises(ArgumentError, match="attempts"):
            Warmup(total, fraction, attempts)
        return
    listed = Warmup(total, fraction, attempts).steps
    assert len(set(listed)) == attempts
    assert listed[0] >= 1
    assert listed[-1] <= total
    assert total * fraction - 1 - 1e-6 < listed[-1] <= total * fraction + 1e-6
    gaps = [b - a for a, b in zip((0, *listed), listed, strict=False)]
    assert max(gaps) - min(gaps) <= 1


def test_the_paper_s_four_attempts():
    assert Warmup(1000).steps == (25, 50, 75, 100)
    assert Warmup(40).steps == (1, 2, 3, 4)
    assert Warmup(100, 0.29, 29).steps[-1] == 29  # 100 * 0.29 is a little below 29 in floating point


def test_once():
    assert Once(1000).steps == (200,)
    assert Once(1000, at=0.1).steps == (100,)
    assert Once(3, at=0.01).steps == (1,)
    assert Once(10, at=1).steps == (10,)


def test_every_includes_both_ends():
    assert Every(10, 5, 25).steps == (5, 15, 25)
    assert Every(10, 5, 24).steps == (5, 15)
    assert Every(1, 7, 7).steps == (7,)


def test_at_sorts_and_accepts_any_iterable():
    assert At([30, 10]).steps == (10, 30)
    assert At(range(2, 5)).steps == (2, 3, 4)
    assert At((7,)) == At([7])
    assert eval(repr(At([30, 10]))) == At([30, 10])


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Once(0), "total_steps: expected a positive integer, got 0"),
        (lambda: Once(10.0), "total_steps"),
        (lambda: Once(10, at=0), r"at: expected a number in \(0, 1\], got 0"),
        (lambda: Once(10, at=1.5), "at"),
        (lambda: Once(10, at=float("nan")), "at"),
        (lambda: Warmup(39), "attempts: expected at least one step per attempt, got 4 attempts in 3.9 steps"),
        (lambda: Warmup(100, attempts=0), "attempts"),
        (lambda: Warmup(100, fraction=2), "fraction"),
        (lambda: Every(0, 1, 2), "interval"),
        (lambda: Every(1, 0, 2), "start"),
        (lambda: Every(1, 5, 4), "stop: expected at least start = 5, got 4"),
        (lambda: At(5), "At: expected a sequence of step numbers"),
        (lambda: At([]), "At: expected at least one step number"),
        (lambda: At([2, 2]), "At.*each once"),
        (lambda: At([0]), "At: expected a positive integer, got 0"),
        (lambda: At([True]), "At"),
        (lambda: At("12"), "At"),
    ],
)
def test_out_of_range(build, match):
    with pytest.raises(ArgumentError, match=match):
        build()
