"""Interleaved timing: every round runs each case once, so that a slow moment of the machine hits all alike."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from compressm.experiments import runs


@dataclass(frozen=True)
class Timing:
    """Milliseconds over the rounds: median, 20th and 80th percentile, minimum."""

    median: float
    low: float
    high: float
    minimum: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        ordered = sorted(samples)
        last = len(ordered) - 1
        low, high = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
        return cls(statistics.median(ordered), low, high, ordered[0], len(ordered))


def interleaved(cases: dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Time every case `rounds` times, round-robin, and a 1024^3 float32 matrix product as the machine's calibration.

    Each timed run follows a short sleep and an untimed run of the same case: thread pools of different libraries spin for a
    while after their last call and would slow whoever comes next.
    """
    matrix = torch.randn(1024, 1024)
    cases = {**cases, "gemm1024": lambda: torch.mm(matrix, matrix)}
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for run in cases.values():
        for _ in range(warmup):
            run()
    for _ in range(rounds):
        for name, run in cases.items():
            time.sleep(0.1)
            run()
            start = time.perf_counter()
            run()
            samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: Timing.of(values) for name, values in samples.items()}


def machine() -> dict[str, object]:
    """What a result file says about where it was measured."""
    root = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=root, check=False).stdout
    return {**runs.machine(torch.device("cpu")), "commit": commit.strip()}


def save(path: Path, results: dict[str, Timing], extra: dict[str, object]) -> None:
    """Write one result file (JSON)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = {"machine": machine(), **extra, "milliseconds": {name: asdict(timing) for name, timing in results.items()}}
    path.write_text(json.dumps(body, indent=1) + "\n")


def table(results: dict[str, Timing]) -> str:
    """One line per case: median [20 %, 80 %]."""
    width = max(map(len, results))
    return "\n".join(f"{name:{width}}  {t.median:9.2f} ms  [{t.low:.2f}, {t.high:.2f}]" for name, t in results.items())
