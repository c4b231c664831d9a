"""Samples are taken in turn, and memory is seen wherever it is allocated."""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch

from compressm.benchmarking import timing
from compressm.benchmarking.timing import Budget, Timed, interleaved, one_call, peak_bytes, summary


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(timing, "PAUSE", 0.0)


def recorder(name, calls, seconds=0.002):
    def run():
        calls.append(name)
        time.sleep(seconds)

    return Timed(run)


def test_every_round_runs_every_contender():
    calls = []
    contenders = {name: recorder(name, calls) for name in "abc"}
    samples = interleaved(contenders, dict.fromkeys("abc", 0.5), Budget(seconds=2.0, fewest=1, most=4), "cpu")
    assert calls == list("abc") * 4
    assert all(len(taken) == 4 and min(taken) >= 0.002 for taken in samples.values())


def test_slow_contenders_take_part_in_evenly_spread_rounds():
    calls = []
    contenders = {name: recorder(name, calls, 0.0) for name in ("fast", "slow", "slower", "slowest")}
    estimates = {"fast": 0.5, "slow": 1.0, "slower": 2.0, "slowest": 99.0}
    interleaved(contenders, estimates, Budget(seconds=4.0, fewest=3, most=8), "cpu")
    assert Counter(calls) == {"fast": 8, "slow": 4, "slower": 2, "slowest": 1}
    places = [i for i, name in enumerate(c for c in calls if c in ("fast", "slow")) if name == "slow"]
    assert len({after - before for before, after in itertools.pairwise(places)}) == 1


def test_rounds_that_were_asked_for_hold_however_slow_a_call_is():
    assert [Budget.of(5).rounds(seconds) for seconds in (1e-6, 1.0, 99.0)] == [5, 5, 5]


def test_fast_calls_are_warmed_and_repeated_within_a_sample():
    calls = []
    samples = interleaved({"x": recorder("x", calls, 0.0)}, {"x": 1e-4}, Budget(fewest=2, most=2), "cpu")
    assert len(samples["x"]) == 2
    assert len(calls) == 2 * (1 + round(timing.SHORTEST_SAMPLE / 1e-4))


def test_the_untimed_call_is_part_of_the_pause(monkeypatch):
    slept = []
    monkeypatch.setattr(timing, "PAUSE", 0.02)
    monkeypatch.setattr(timing.time, "sleep", slept.append)
    estimates = {"short": 0.005, "as long": 0.02, "longer": 0.05, "not warmed": timing.WARM_BELOW}
    interleaved({name: Timed(lambda: None) for name in estimates}, estimates, Budget(fewest=1, most=1), "cpu")
    assert slept == pytest.approx([0.015, 0.0, 0.0, 0.02])


def test_setup_is_not_timed_and_runs_before_every_call():
    made = []

    def setup():
        time.sleep(0.05)
        made.append(object())
        return made[-1]

    seen = []
    samples = interleaved({"x": Timed(seen.append, setup)}, {"x": 1e-6}, Budget(fewest=3, most=3), "cpu")
    assert max(samples["x"]) < 0.05
    assert seen == made
    assert one_call(Timed(seen.append, setup), "cpu", warm=True)[0] < 0.05


@pytest.mark.parametrize("warm", [True, False])
def test_an_estimate_calls_slow_contenders_once_when_they_are_warm(warm):
    calls = []
    assert one_call(recorder("slow", calls, timing.ESTIMATE_SECONDS), "cpu", warm=warm)[0] >= timing.ESTIMATE_SECONDS
    assert len(calls) == (1 if warm else 2)


def test_an_estimate_leaves_out_what_compiles():
    calls = []

    def compiles_first():
        calls.append("compiled")
        time.sleep(0.3 if calls.count("compiled") == 1 else 0.01)

    assert 0.01 <= one_call(Timed(compiles_first), "cpu", warm=False)[0] < 0.1
    assert calls.count("compiled") > 3


def test_a_contender_that_raises_does_not_stop_the_others():
    def fails():
        raise ValueError("no")

    calls = []
    contenders = {"bad": Timed(fails), "good": recorder("good", calls)}
    samples = interleaved(contenders, {"bad": 0.5, "good": 0.5}, Budget(seconds=1.5, fewest=3, most=3), "cpu")
    assert isinstance(samples["bad"], ValueError)
    assert len(samples["good"]) == 3


def test_summary():
    found = summary([0.005, 0.001, 0.004, 0.002, 0.003, 0.010])
    assert (found.median, found.low, found.high, found.minimum, found.rounds) == (3.5, 2.0, 5.0, 1.0, 6)
    single = summary([0.002])
    assert single.low == single.high == single.median == 2.0
    for count in (2, 3, 4):
        assert summary([0.001 * (i + 1) for i in range(count)]).rounds == count  # the schema checks the order


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark")
def test_peak_memory_sees_what_torch_and_numpy_hold_for_a_moment():
    megabytes = 64
    entries = megabytes << 18

    def torch_run():
        a = torch.ones(entries)
        return a.add(1).sum()

    def numpy_run():
        return np.ones(entries, dtype=np.float32).sum()

    for run, expected in ((torch_run, 2 * megabytes), (numpy_run, megabytes), (torch_run, 2 * megabytes)):
        found = peak_bytes(Timed(run), "cpu")[0] / 2**20
        assert expected - 4 < found < expected + 16
    assert peak_bytes(Timed(lambda: None), "cpu")[0] < 1 << 22
    held = []
    of_run, _ = peak_bytes(Timed(held.append, lambda: np.ones(entries, dtype=np.float32)), "cpu")
    assert of_run < 1 << 22
