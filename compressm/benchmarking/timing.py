"""Interleaved timing and peak memory.

Every round runs each contender once, so that a slow moment of the machine hits all alike.  Slow contenders take part in fewer
rounds, evenly spread.  Freed memory stays with the process meanwhile, as in ``compressm train``.  Memory is looked at in calls
of their own: neither figure disturbs the other.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressm.benchmarking.limits import synchronizer
from compressm.benchmarking.results import Milliseconds
from compressm.experiments.freed_memory import freed_memory_kept

PAUSE = 0.02  # seconds between a sample and the last call of others, whose thread pools spin for a while after it
WARM_BELOW = 0.1  # seconds; faster calls run once untimed in front of every sample
ESTIMATE_SECONDS = 0.1  # of the warm calls that an estimate takes
SHORTEST_SAMPLE = 1e-3  # seconds; faster calls are repeated within one


@dataclass(frozen=True)
class Timed:
    """What is timed: ``run(setup())``, of which only ``run`` counts; without ``setup`` it takes nothing."""

    run: Callable[..., Any]
    setup: Callable[[], Any] | None = None

    def arguments(self) -> tuple[Any, ...]:
        """For one call of ``run``."""
        return () if self.setup is None else (self.setup(),)


@dataclass(frozen=True)
class Budget:
    """How long the samples of one contender may take together, and how many there are.

    Attributes:
        seconds: for one contender's samples, their warm-up calls not counted.
        fewest: rounds of a contender however slow, but for the next two.
        most: rounds of any contender.
        twice_above, once_above: seconds of one call above which it has two rounds, or a single one.
        longest: seconds of one call above which a contender is left out.
    """

    seconds: float = 0.5
    fewest: int = 3
    most: int = 25
    twice_above: float = 1.0
    once_above: float = 3.5
    longest: float = 20.0

    @classmethod
    def of(cls, rounds: int) -> Budget:
        """As many rounds for every contender."""
        unlimited = math.inf
        return cls(seconds=unlimited, fewest=rounds, most=rounds, twice_above=unlimited, once_above=unlimited)

    def rounds(self, one_call: float) -> int:
        """Rounds of a contender that takes ``one_call`` seconds."""
        if one_call > self.once_above:
            return 1
        if one_call > self.twice_above:
            return min(2, self.fewest)
        return max(self.fewest, int(min(self.most, self.seconds / max(one_call, SHORTEST_SAMPLE))))


@freed_memory_kept()
def interleaved(
    contenders: Mapping[Hashable, Timed], estimates: Mapping[Hashable, float], budget: Budget, device: torch.device | str
) -> dict[Hashable, list[float] | Exception]:
    """Seconds per call of every contender in turn, round after round.

    Args:
        contenders: warm, by any key.
        estimates: seconds of one warm call by the same keys, see :func:`one_call`.
        budget: of each.
        device: to wait for.

    Returns:
        samples in the order they were taken, or the exception that a contender raised.
    """
    rounds = {key: budget.rounds(estimates[key]) for key in contenders}
    last = max(rounds.values(), default=0)
    samples: dict[Hashable, list[float] | Exception] = {key: [] for key in contenders}
    synchronize = synchronizer(device)
    for number in range(last):
        for key, timed in contenders.items():
            taken = samples[key]
            due = math.floor((number + 1) * rounds[key] / last)
            if isinstance(taken, Exception) or len(taken) >= due:
                continue
            try:
                taken.append(_sample(timed, estimates[key], synchronize))
            except Exception as error:  # a contender's own: it is reported in its place, the others go on
                samples[key] = error
    return samples


def one_call(timed: Timed, device: torch.device | str, *, warm: bool) -> tuple[float, int | None]:
    """Seconds and peak bytes of a warm call, see :func:`peak_bytes`.

    Slow contenders are called once, or twice where they are not ``warm``: then the first call may still compile.
    """
    synchronize = synchronizer(device)
    if not warm:
        timed.run(*timed.arguments())
    peak, best = peak_bytes(timed, device)
    spent = max(best, ESTIMATE_SECONDS / 5)
    while spent < ESTIMATE_SECONDS:
        seconds = _time(timed, 1, synchronize)
        best, spent = min(best, seconds), spent + max(seconds, ESTIMATE_SECONDS / 5)
    return best, peak


def _sample(timed: Timed, estimate: float, synchronize: Callable[[], None]) -> float:
    warmed = estimate < WARM_BELOW
    time.sleep(max(0.0, PAUSE - estimate) if warmed else PAUSE)  # the untimed call is part of the pause
    if warmed:
        timed.run(*timed.arguments())
    repeats = 1 if timed.setup is not None else max(1, math.ceil(SHORTEST_SAMPLE / max(estimate, 1e-7)))
    return _time(timed, repeats, synchronize)


def _time(timed: Timed, repeats: int, synchronize: Callable[[], None]) -> float:
    arguments = timed.arguments()
    collecting = gc.isenabled()
    gc.disable()
    try:
        synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            timed.run(*arguments)
        synchronize()
        return (time.perf_counter() - started) / repeats
    finally:
        if collecting:
            gc.enable()


def summary(samples: list[float]) -> Milliseconds:
    """The statistics of samples that were taken in seconds."""
    ordered = sorted(1e3 * sample for sample in samples)
    last = len(ordered) - 1
    low, high = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
    median = statistics.median(ordered)
    return Milliseconds(
        median=median, low=min(low, median), high=max(high, median), minimum=ordered[0], rounds=len(ordered)
    )


def peak_bytes(timed: Timed, device: torch.device | str) -> tuple[int | None, float]:
    """(largest memory that one call holds beyond what is there before it, seconds of the call).

    The memory is None where the system does not tell.  On a GPU it is that of torch's allocator: other libraries'
    is not seen.  On Linux it is the resident set: what is freed goes back to the system first, and the kernel's own
    high-water mark is set anew, so that any library's memory counts.
    """
    device = torch.device(device)
    synchronize = synchronizer(device)
    arguments = timed.arguments()
    gc.collect()
    synchronize()
    before = _restart_high_water_mark(device)
    started = time.perf_counter()
    timed.run(*arguments)
    synchronize()
    seconds = time.perf_counter() - started
    return None if before is None else max(0, _high_water_mark(device) - before), seconds


def _restart_high_water_mark(device: torch.device) -> int | None:
    """Bytes that are held now, or None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return _resident("VmRSS")


def _high_water_mark(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))
