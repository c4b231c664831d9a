"""Interleaved timing by device events: every round runs each case once, behind a write that empties the second-level cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from gpu.session import brief

FLUSH_BYTES = 256 << 20  # several times the largest second-level cache
FEWEST, MOST = 5, 40  # rounds


class Timer:
    """Times calls on one device."""

    def __init__(self, device: str, *, fewest: int = FEWEST, most: int = MOST) -> None:
        self.cuda, self.fewest, self.most = device == "cuda", fewest, most
        self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device) if self.cuda else None

    def interleaved(self, cases: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, dict[str, Any]]:
        """Milliseconds of every case in about ``seconds`` together; 0: the fewest rounds.

        Returns:
            median, 20th and 80th percentile, minimum and rounds by case, or ``{"error": ...}`` for one that raised.
        """
        samples: dict[str, list[float]] = {name: [] for name in cases}
        found: dict[str, dict[str, Any]] = {}
        total = 0.0
        for name, call in cases.items():
            try:
                call()
                total += self._one(call) if seconds else 0.0
            except Exception as error:  # of one case: it is reported in its place
                found[name] = {"error": brief(error)}
        alive = {name: call for name, call in cases.items() if name not in found}
        rounds = max(self.fewest, min(self.most, int(seconds * 1e3 / max(total, 1e-3))))
        for _ in range(rounds):
            for name, call in alive.items():
                samples[name].append(self._one(call))
        return {name: found[name] if name in found else summary(samples[name]) for name in cases}

    def _one(self, call: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        if not self.cuda:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def summary(samples: list[float]) -> dict[str, Any]:
    """Of samples in milliseconds."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered), "low": ordered[round(0.2 * last)], "high": ordered[round(0.8 * last)],
        "minimum": ordered[0], "rounds": len(ordered),
    }  # fmt: skip
