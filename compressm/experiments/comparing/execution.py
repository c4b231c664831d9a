"""All runs of a comparison, one after the other or side by side, until they are done or the time is up."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from compressm.experiments.comparing.design import Design, Job
from compressm.experiments.comparing.jobs import run_job
from compressm.experiments.freed_memory import freed_memory_kept

POLL_SECONDS = 0.1


class Display(Protocol):
    """Who is told how a comparison goes on."""

    def started(self, job: Job, steps: int) -> None:
        """A run begins or goes on."""

    def stepped(self, job: Job, step: int) -> None:
        """So many of its steps are done."""

    def finished(self, job: Job) -> None:
        """Its record is written."""


@dataclass
class StepObserver:
    """Tells the steps of one run."""

    job: Job
    tell: Callable[[Job, int], None]

    def point(self, run: str, point: dict[str, Any]) -> None:
        self.tell(self.job, point["step"])

    def evaluation(self, run: str, evaluation: dict[str, Any]) -> None:
        """Nothing to tell."""

    def reduction(self, run: str, reduction: dict[str, Any]) -> None:
        """Nothing to tell."""


def execute(
    design: Design, out: Path, display: Display, stopped: Callable[[], bool], *, workers: int = 1, budget: float | None = None
) -> bool:
    """Do all runs that have no record yet.

    Args:
        design: the comparison.
        out: the output folder.
        display: is told how it goes on.
        stopped: becomes true to end it early.
        workers: runs at a time, each in a process of its own if there are several.
        budget: seconds after which it ends early; None: no such limit.

    Returns:
        whether all are done; those that were ended early go on from their checkpoints the next time.

    Raises:
        CompressmError: of a run; all others are saved.
    """
    deadline = None if budget is None else time.monotonic() + budget

    def over() -> bool:
        return stopped() or (deadline is not None and time.monotonic() >= deadline)

    todo = [job for job in design.jobs() if not is_done(job, out)]
    if workers == 1 or len(todo) < 2:
        return _one_by_one(design, out, display, todo, over)
    return _side_by_side(design, out, display, todo, over, min(workers, len(todo)))


def is_done(job: Job, out: Path) -> bool:
    """Whether the record of a run is there."""
    return job.path(out, ".json").exists()


def _one_by_one(design: Design, out: Path, display: Display, todo: Sequence[Job], over: Callable[[], bool]) -> bool:
    steps = design.base.steps
    with freed_memory_kept():
        for job in todo:  # in this order every run comes after those that it needs
            if over():
                return False
            display.started(job, steps)
            if not run_job(design, job, out, StepObserver(job, display.stepped), over):
                return False
            display.finished(job)
    return True


def _side_by_side(
    design: Design, out: Path, display: Display, todo: Sequence[Job], over: Callable[[], bool], workers: int
) -> bool:
    steps, waiting = design.base.steps, {job: design.before(job) for job in todo}
    running: dict[Future[bool], Job] = {}
    with _pool(workers) as (pool, stop, told):
        while waiting or running:
            if over():
                stop.set()
                waiting.clear()
            ready = [job for job, others in waiting.items() if all(is_done(other, out) for other in others)]
            for job in ready[: workers - len(running)]:
                del waiting[job]
                display.started(job, steps)
                running[pool.submit(_work, design, job, out)] = job
            done, _ = wait(running, POLL_SECONDS, FIRST_COMPLETED)
            for job, step in _drained(told):
                display.stepped(job, step)
            for future in done:
                job = running.pop(future)
                if future.result():
                    display.finished(job)
    return all(is_done(job, out) for job in todo)


@contextmanager
def _pool(workers: int) -> Iterator[tuple[ProcessPoolExecutor, Any, Any]]:
    """Processes, what stops their runs, and the queue in which they tell their steps; at the end they are told to stop."""
    context = multiprocessing.get_context("spawn")
    stop, told = context.Event(), context.Queue()
    threads = max(1, torch.get_num_threads() // workers)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(stop, told, threads))
    try:
        yield pool, stop, told
    finally:
        stop.set()
        pool.shutdown(wait=True)
        for _ in _drained(told):
            pass
        told.close()


def _drained(told: Any) -> Iterator[tuple[Job, int]]:
    while True:
        try:
            yield told.get_nowait()
        except queue.Empty:
            return


_shared: dict[str, Any] = {}  # of a process that works for a comparison


def _begin(stop: Any, told: Any, threads: int) -> None:
    """Prepare such a process: the terminal's signals are its parent's, which stops it, and it does not outlive that."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(threads)
    _shared.update(stop=stop, told=told, orphaned=threading.Event(), busy=threading.Lock())
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """End the process when its parent has: after the run that it works on is saved."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    _shared["orphaned"].set()
    with _shared["busy"]:
        os._exit(1)


def _work(design: Design, job: Job, out: Path) -> bool:
    def stopped() -> bool:
        return _shared["orphaned"].is_set() or _shared["stop"].is_set()

    with _shared["busy"], freed_memory_kept():
        return run_job(design, job, out, StepObserver(job, lambda job, step: _shared["told"].put((job, step))), stopped)
