"""What the terminal shows while runs go on: a live table, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from compressm.compression.planning.report import LayerReduction, describe
from compressm.experiments.tasks.metrics import Metric

LINE_SECONDS = 15.0  # between plain lines about one run


@dataclass
class _Row:
    title: str
    steps: int
    states: list[int]
    point: dict[str, Any] = field(default_factory=dict)
    watched: float | None = None


class TrainingDisplay:
    """Follows the runs of one command; a context manager around all of them.

    Args:
        console: where to write; a live table if it is a terminal, lines otherwise.
        runs: how many there will be.
        metric: of the task.
    """

    def __init__(self, console: Console, runs: int, metric: Metric) -> None:
        self.console, self.runs, self.metric = console, runs, metric
        self.rows: dict[str, _Row] = {}
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            console=console,
        )  # fmt: skip
        self._task: Any = None
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._render) if console.is_terminal else None
        self._spoken = 0.0

    def __enter__(self) -> TrainingDisplay:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*details)

    def started(self, run: str, title: str, steps: int, parameters: int, states: Sequence[int]) -> None:
        """A run begins or goes on."""
        self.rows[run] = _Row(title, steps, list(states))
        if self._task is not None:
            self.progress.remove_task(self._task)
        self._task = self.progress.add_task(f"{len(self.rows)}/{self.runs} {title}", total=steps)
        self._spoken = time.monotonic()
        self.message(f"[bold]{title}[/]: {steps} steps, {parameters:,} parameters, states per layer {_states(states)}")

    def message(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, highlight=False, soft_wrap=not self.console.is_terminal)

    def point(self, run: str, point: dict[str, Any]) -> None:
        """A new point of the training curve."""
        row = self.rows[run]
        row.point, row.states = point, point["states"]
        self.progress.update(self._task, completed=point["step"])
        now = time.monotonic()
        if self._live is None and now - self._spoken > LINE_SECONDS:
            self._spoken = now
            self.message(f"  {row.title}: {self._line(row)}")

    def evaluation(self, run: str, evaluation: dict[str, Any]) -> None:
        """The metric on the split that it watches."""
        row = self.rows[run]
        row.watched = evaluation[self.metric.key]
        if self._live is None:
            self._spoken = time.monotonic()
            self.message(f"  {row.title}: {self._line(row)}")

    def reduction(self, run: str, reduction: dict[str, Any]) -> None:
        """A reduction was made."""
        metric = self.metric
        before, after = (metric.live(reduction[f"{metric.key}_{side}"]) for side in ("before", "after"))
        self.message(
            f"[bold green]reduced[/] at step {reduction['step']} in {reduction['seconds']:.2f} s, "
            f"{metric.watched} {metric.short} {before} -> {after}"
        )
        for layer in reduction["layers"]:
            self.message(f"  {describe(LayerReduction.from_dict(layer))}")
        self.rows[run].states = [layer["rank_after"] for layer in reduction["layers"]]

    def _render(self) -> Group:
        table, metric = Table(box=None, pad_edge=False), self.metric
        watched = f"{metric.watched} {metric.short}"
        for heading in ("run", "step", "loss", metric.short, watched, "states per layer", "ms/step"):
            table.add_column(heading, justify="left" if heading == "run" else "right")
        for row in self.rows.values():
            point = row.point
            table.add_row(
                row.title,
                str(point.get("step", 0)),
                f"{point['loss']:.3f}" if point else "",
                metric.live(point[metric.key], metric.digits - 1) if point else "",
                "" if row.watched is None else metric.live(row.watched),
                _states(row.states),
                f"{point['seconds_per_step'] * 1e3:.1f}" if point else "",
            )
        return Group(table, self.progress)

    def _line(self, row: _Row) -> str:
        point, metric = row.point, self.metric
        text = (
            f"step {point['step']}/{row.steps}, loss {point['loss']:.3f}, "
            f"{metric.short} {metric.live(point[metric.key], metric.digits - 1)}, "
            f"states {_states(row.states)}, {point['seconds_per_step'] * 1e3:.1f} ms/step"
        )
        return text if row.watched is None else f"{text}, {metric.watched} {metric.short} {metric.live(row.watched)}"


def _states(states: Sequence[int]) -> str:
    return str(states[0]) if len(set(states)) == 1 else ", ".join(map(str, states))
