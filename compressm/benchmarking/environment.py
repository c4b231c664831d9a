"""Where and with what a benchmark was run."""

from __future__ import annotations

import importlib.metadata
import statistics
import subprocess
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import compressm
from compressm.benchmarking.limits import synchronizer
from compressm.experiments import runs

RESULTS = "benchmarks/results"  # what a run itself changes in a checkout


def describe(device: torch.device | str, packages: Iterable[str]) -> dict[str, Any]:
    """The machine as in a training report, with commit, date and the installed versions of packages."""
    machine = runs.machine(torch.device(device))
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {**machine, "commit": commit(), "date": date, "versions": versions(packages)}


def commit() -> str:
    """Of the checkout that the package runs from, ending in ``-dirty`` where files differ; empty outside of one."""
    root = Path(compressm.__file__).parents[1]
    found = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--", ".", f":!{RESULTS}")
    return found + ("-dirty" if found and changed else "")


def _git(root: Path, *arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root, check=False).stdout.strip()
    except OSError:
        return ""


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed, by name."""
    found = {}
    for package in sorted(set(packages)):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


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
