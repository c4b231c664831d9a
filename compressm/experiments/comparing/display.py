"""What the terminal shows while a comparison goes on: bars, or lines where there is no terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from compressm.experiments.comparing.design import Design, Job
from compressm.experiments.comparing.execution import is_done
from compressm.experiments.comparing.records import read_entry
from compressm.experiments.methods import METHODS
from compressm.experiments.reports.summary import duration


class ComparisonDisplay:
    """Follows the runs of one comparison; a context manager around all of them.

    Args:
        console: where to write.
        design: the comparison.
        out: its folder.
    """

    def __init__(self, console: Console, design: Design, out: Path) -> None:
        self.console, self.out = console, out
        jobs = design.jobs()
        self.total, self.done = len(jobs), sum(is_done(job, out) for job in jobs)
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._all: Any = self.progress.add_task("runs", total=self.total, completed=self.done)
        self._bars: dict[Job, Any] = {}

    def __enter__(self) -> ComparisonDisplay:
        self.progress.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self.progress.__exit__(*details)

    def message(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, highlight=False, soft_wrap=not self.console.is_terminal)

    def started(self, job: Job, steps: int) -> None:
        """A run begins or goes on."""
        self._bars[job] = self.progress.add_task(_words(job), total=steps)

    def stepped(self, job: Job, step: int) -> None:
        """So many of its steps are done."""
        if job in self._bars:
            self.progress.update(self._bars[job], completed=step)

    def finished(self, job: Job) -> None:
        """Its record is written."""
        self.progress.remove_task(self._bars.pop(job))
        self.done += 1
        self.progress.update(self._all, completed=self.done)
        entry = read_entry(job.path(self.out, ".json"))
        result = "diverged" if entry.diverged else entry.measure.text(entry.score)
        took = duration(entry.run.final.seconds_total)
        self.message(f"{self.done}/{self.total} {_words(job)}: {result}, {took}")


def _words(job: Job) -> str:
    tuned = f", tuning: lr x{job.multiple:g}" if job.multiple is not None else ""
    return f"{METHODS[job.method].title}, seed {job.seed}{tuned}"
