"""Checks run in processes of their own: a kernel that breaks the device's context takes its own job down, and compilation is
shared out among the processors.  Every job appends JSON lines to a file, so that one that is stopped leaves what it has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.session import ENTRY, ROOT, Part, Session

GIGABYTES = 70  # of the device that jobs may take together
STOP_AFTER = 5.0  # seconds that a job may take to end when it is told to


@dataclass(frozen=True)
class Job:
    """A process.

    Attributes:
        name: unique, also of its files.
        command: program and arguments.
        limit: seconds.
        gigabytes: of device memory at most, roughly.
        environment: variables to set.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    gigabytes: float = 6.0
    environment: tuple[tuple[str, str], ...] = ()


def own(session: Session, work: str, name: str, limit: float, folder: Path, under: tuple[str, ...] = (), **extra: Any) -> Job:
    """A job that runs ``work`` of gpu.work in this program; under: the command of a tool that watches it."""
    command = (
        *under, sys.executable, str(ENTRY), "--device", session.device, "--out", str(folder / f"{name}.jsonl"),
        "--work", work, *(["--smoke"] if session.smoke else []),
    )  # fmt: skip
    return Job(name, command, limit, **extra)


def run_all(jobs: list[Job], part: Part, folder: Path, processors: int, reserve: float = 0.0) -> dict[str, dict[str, Any]]:
    """Run jobs in their order, as many at a time as processors and memory allow, until ``reserve`` seconds are left.

    Returns:
        by name: rows (the JSON lines of its file), log (the end of its output), code (None: stopped at its limit or the
        part's, or not started), seconds.
    """
    waiting, running = list(jobs), {}
    done: dict[str, dict[str, Any]] = {}
    while waiting or running:
        for name, (job, process, started) in list(running.items()):
            late = time.monotonic() - started > job.limit or part.left() <= reserve
            if process.poll() is None and not late:
                continue
            code = process.poll()
            if code is None:
                _stop(process)
            seconds = round(time.monotonic() - started, 1)
            done[name] = {"code": code, "seconds": seconds, "rows": list(_rows(folder, name)), "log": _log(folder, name)}
            del running[name]
        memory = sum(job.gigabytes for job, *_ in running.values())
        while waiting and len(running) < processors and memory + waiting[0].gigabytes <= GIGABYTES and part.left() > reserve:
            job = waiting.pop(0)
            memory += job.gigabytes
            running[job.name] = (job, _start(job, folder), time.monotonic())
        if waiting and part.left() <= reserve:
            done |= {job.name: {"code": None, "seconds": 0.0, "rows": [], "log": "not started"} for job in waiting}
            waiting = []
        time.sleep(0.1)
    return done


def _start(job: Job, folder: Path) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **dict(job.environment)}
    with (folder / f"{job.name}.log").open("w") as log:
        return subprocess.Popen(
            job.command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )


def _stop(process: subprocess.Popen) -> None:
    """End a process and those that it started."""
    for signal in (15, 9):
        try:
            os.killpg(process.pid, signal)
            process.wait(STOP_AFTER)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _rows(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    path = folder / f"{name}.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:  # the last line of a job that was stopped
            return


def _log(folder: Path, name: str) -> str:
    return (folder / f"{name}.log").read_text(errors="replace")[-4000:]
