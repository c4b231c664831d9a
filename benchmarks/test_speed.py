"""Every contender of every case: right, timed beside the others, and handed to pytest-benchmark."""

from __future__ import annotations

import pytest

from compressm.benchmarking.results import Missing


class RecordedTime:
    """A clock that moves only by what was measured."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, samples: list[float]) -> None:
        self.now += samples.pop(0)


CLOCK = RecordedTime()


@pytest.mark.benchmark(timer=CLOCK)
def test_speed(entry, suite, benchmark):
    verdict, samples = suite.verdict(entry)
    if isinstance(verdict, Missing):
        failed = verdict.reason.startswith(("wrong", "raised"))
        benchmark.skipped = True
        (pytest.fail if failed else pytest.skip)(verdict.reason)
    if benchmark.disabled or not samples:
        pytest.skip("right, not timed")
    benchmark.group = entry.case.group
    benchmark.extra_info = {name: getattr(verdict, name) for name in ("error", "peak_bytes", "limit_ms", "share_of_limit")}
    samples = list(samples)
    benchmark.pedantic(CLOCK.advance, args=(samples,), rounds=len(samples), iterations=1)
