"""Where and with what a benchmark was run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import torch

from compressm.benchmarking.limits import synchronizer
from compressm.experiments import runs
from compressm.experiments.provenance import commit, versions


def describe(device: torch.device | str, packages: Iterable[str]) -> dict[str, Any]:
    """The machine as in a training report, with commit, date and the installed versions of packages."""
    machine = runs.machine(torch.device(device))
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {**machine, "commit": commit(), "date": date, "versions": versions(packages)}


def quietness(device: torch.device | str, repeats: int = 11) -> dict[str, float]:
    """Milliseconds of one 1024^3 float32 matrix product: ``median`` and ``best``.  Far apart, the machine was busy."""
    matrix, synchronize = torch.randn(1024, 1024, device=device), synchronizer(device)
    samples = []
    for _ in range(repeats):
        synchronize()
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        synchronize()
        samples.append(1e3 * (time.perf_counter() - started))
    return {"median": statistics.median(samples), "best": min(samples)}
