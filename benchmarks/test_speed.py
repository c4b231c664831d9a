"""Every contender of every case: right, timed beside the others, and handed to pytest-benchmark."""

from __future__ import annotations

import pytest

from compressm.benchmarking.results import Missing
from compressm.benchmarking.running import OURS, RAISED, WRONG


class RecordedTime:
    """A clock that moves only by what was measured."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, samples: list[float]) -> None:
        self.now += samples.pop(0)


CLOCK = RecordedTime()


def _report(missing: Missing) -> None:
    """Wrong answers, and whatever ours raises, fail the run; a peer that raises is recorded and the run goes on."""
    if missing.reason.startswith(RAISED) and missing.contender != OURS:
        pytest.xfail(missing.reason)
    if missing.reason.startswith((RAISED, WRONG)):
        pytest.fail(missing.reason)
    pytest.skip(missing.reason)


@pytest.mark.benchmark(timer=CLOCK)
def test_speed(entry, suite, benchmark):
    verdict, samples = suite.verdict(entry)
    if isinstance(verdict, Missing):
        _report(verdict)
    if not samples:
        pytest.skip("not timed in this session")
    benchmark.group = entry.case.group
    benchmark.extra_info = {name: getattr(verdict, name) for name in ("error", "peak_bytes", "limit_ms", "share_of_limit")}
    samples = list(samples)
    benchmark.pedantic(CLOCK.advance, args=(samples,), rounds=len(samples), iterations=1)
