"""The report's pictures, each with its words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from compressm.experiments.methods import METHODS
from compressm.experiments.reports.data import LayerCut, Report, Run, clean
from compressm.experiments.reports.drawing import (
    THEME,
    Points,
    canvas,
    draw,
    draw_run,
    finish,
    legend,
    log_axis,
    look,
    plain,
    smooth,
    svg_of,
    thin,
)
from compressm.experiments.reports.summary import listed

SMOOTHED = 40  # a loss of so many points is smoothed
FLOOR = 1e-12  # singular values below this share of the largest are not drawn


@dataclass(frozen=True)
class Picture:
    """A picture and its words.

    Attributes:
        title: above it.
        caption: how to read it.
        svg: an ``<svg>`` element for HTML, colours ``var(--name, #light)``.
    """

    title: str
    caption: str
    svg: str


def spectra(report: Report) -> list[Picture]:
    """One picture per layer: its Hankel singular values before and after every cut."""
    run = next((run for run in report.runs if run.reductions), None)
    if run is None:
        return []
    names = dict.fromkeys(layer.name for cut in run.reductions for layer in cut.layers)
    pictures = []
    for name in names:
        cuts = [(cut.step, layer) for cut in run.reductions for layer in cut.layers if layer.name == name and layer.spectrum]
        cuts = [item for item in cuts if item[1].changed] or cuts[-1:]
        if cuts:
            pictures.append(_spectrum(name, cuts, look(run.name).colour))
    return pictures


def states(report: Report) -> Picture | None:
    """States of all layers together."""
    series = [(run, _states(run)) for run in report.runs]
    if not any(points for _, points in series):
        return None
    with canvas() as (figure, ax):
        for run, points in series:
            draw_run(ax, run, points, drawstyle="steps-post")
        ax.set_ylim(0, 1.06 * max(y for _, points in series for _, y in points))
        ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.yaxis.set_major_formatter(FuncFormatter(plain))
        for total in {points[-1][1] for _, points in series if points}:
            ax.annotate(f" {total:,}", (1, total), xycoords=ax.get_yaxis_transform(), va="center", weight="bold")
        finish(figure, ax, report, "states, all layers together", "step")
        svg = svg_of(figure)
    cut = _cut_runs(report) or ["a run"]
    words = f"{listed(cut)} {'is' if len(cut) == 1 else 'are'} cut"
    return Picture("States", f"The state of the whole model. It shrinks only where {words}.", svg)


def loss(report: Report) -> Picture | None:
    """Training loss."""
    series = [(run, thin([(p.step, p.loss) for p in run.curve])) for run in report.runs]
    values = [y for _, points in series for _, y in points if y is not None]
    if not values:
        return None
    logarithmic = min(values) > 0 and max(values) > 3 * min(values)
    with canvas() as (figure, ax):
        for run, points in series:
            if len(points) >= SMOOTHED:
                draw_run(ax, run, points, alpha=0.25, linewidth=0.8, linestyle="-")
                points = smooth(points, max(3, len(points) // 25))
            draw_run(ax, run, points)
        if logarithmic:
            log_axis(ax)
        finish(figure, ax, report, "training loss" + (", log scale" if logarithmic else ""), "step")
        svg = svg_of(figure)
    caption = "Mean over the steps between two points"
    caption += " (thin), smoothed (thick)." if any(len(points) >= SMOOTHED for _, points in series) else "."
    if diverged := [run.label for run in report.runs if run.diverged]:
        caption += f" A line that ends early has diverged: {', '.join(diverged)}."
    return Picture("Training loss", caption, svg)


def score(report: Report) -> Picture | None:
    """The metric by step, with its change at every cut."""
    series = [(run, _scores(report, run)) for run in report.runs]
    watched = report.measure.watched
    caption = f"Measured on the {watched} set."
    if any(report.around(cut)[1] is not None for run in report.runs for cut in run.reductions):
        words = listed(_cut_runs(report))
        caption += f" {words[0].upper()}{words[1:]} also just before and after every cut."
    return _score_picture(report, series, "by step", caption, "step")


def score_by_time(report: Report) -> Picture | None:
    """The metric by seconds of training."""
    series = []
    for run in report.runs:
        timed = [(run.elapsed(e.step), report.score(e)) for e in run.evaluations]
        series.append((run, [(t, y) for t, y in timed if t is not None]))
    caption = "Time of all steps and reductions, without evaluations."
    if len(report.runs) > 1:
        caption += " A line that ends further left trained faster."
    return _score_picture(report, series, "by training time", caption, "time")


def step_time(report: Report) -> Picture | None:
    """Milliseconds per training step."""
    series = [(run, thin([(p.step, p.seconds_per_step) for p in run.curve], 1e3)) for run in report.runs]
    top = 1.15e3 * max(run.slowest_step for run in report.runs)
    if top <= 0:
        return None
    outside = sum(y is not None and y > top for _, points in series for _, y in points)
    with canvas() as (figure, ax):
        for run, points in series:
            draw_run(ax, run, points)
        ax.set_ylim(0, top)
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        ax.yaxis.set_major_formatter(FuncFormatter(plain))
        finish(figure, ax, report, "ms per training step", "step")
        svg = svg_of(figure)
    caption = "Mean over the steps between two points" + (", one run after the other." if len(report.runs) > 1 else ".")
    if outside:
        caption += f" {outside} point{'s' * (outside > 1)} above the picture (start-up, other load) not shown."
    return Picture("Step time", caption, svg)


def _spectrum(name: str, cuts: list[tuple[int, LayerCut]], colour: str) -> Picture:
    last = cuts[-1][1]
    top = max([value for _, cut in cuts for value in cut.spectrum if math.isfinite(value)], default=0.0)
    many = len(cuts) > 1
    after_style: dict[str, Any] = {"color": THEME["ink"], "linewidth": 1.1, "linestyle": (0, (1, 1.5))}
    with canvas() as (figure, ax):
        for index, (_, cut) in enumerate(cuts):
            strength = 1.0 if not many else 0.4 + 0.6 * index / (len(cuts) - 1)
            kept = cut.kept_values
            values = [(i + 1, v if v > FLOOR * top else None) for i, v in enumerate(cut.spectrum)]
            draw(ax, values[max(kept - 1, 0) :], color=THEME["soft"], linewidth=1.0, alpha=strength)
            draw(ax, values[:kept], color=colour, linewidth=2.0, alpha=strength)
            if cut.changed:
                ax.axvline(kept + 0.5, color=colour, linewidth=1.0, linestyle=(0, (3, 2)), alpha=strength)
        if last.changed:
            ax.axvspan(last.kept_values + 0.5, len(cuts[0][1].spectrum), color=THEME["soft"], alpha=0.10, linewidth=0)
            after = [(i + 1, v if v > FLOOR * top else None) for i, v in enumerate(last.spectrum_after)]
            draw(ax, after, **after_style)
        ax.set_xlim(1, max(2, *(len(cut.spectrum) for _, cut in cuts)))
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if top > 0:
            log_axis(ax)
        ax.set_title("Hankel singular value, log scale", loc="left")
        ax.set_title(_kept_title(cuts), loc="right", color=colour)
        ax.set_xlabel("index, largest first")
        handles = [Line2D([], [], color=colour, linewidth=2.0, label="before, kept")]
        if last.changed:
            handles.append(Line2D([], [], color=THEME["soft"], linewidth=1.0, label="before, cut off"))
            if last.spectrum_after:
                handles.append(Line2D([], [], **after_style, label="after the cut"))
        legend(figure, handles)
        svg = svg_of(figure)
    return Picture(clean(name) or "(model)", _spectrum_caption(cuts), svg)


def _cut_runs(report: Report) -> list[str]:
    """``the compressed run``: how sentences call the runs that were cut."""
    cut = [run.name for run in report.runs if run.reductions]
    return [METHODS[name].phrase if name in METHODS else f"the run {clean(name)}" for name in cut]


def _kept_title(cuts: list[tuple[int, LayerCut]]) -> str:
    last = cuts[-1][1]
    if not last.changed:
        return "nothing cut"
    return " → ".join(str(n) for n in (*(len(cut.spectrum) for _, cut in cuts[:4]), last.kept_values)) + " values"


def _spectrum_caption(cuts: list[tuple[int, LayerCut]]) -> str:
    step, last = cuts[-1]
    where = f"step {step:,}" if len(cuts) == 1 else f"steps {', '.join(f'{s:,}' for s, _ in cuts)} (pale to strong)"
    text = f"{last.rank_before if len(cuts) == 1 else cuts[0][1].rank_before} states"
    text += f" → {last.rank_after} at {where}; {last.spectrum_name}."
    balanced = last.changed and last.method.startswith("balanced")
    if balanced and list(last.spectrum_after) == list(last.spectrum[: len(last.spectrum_after)]):
        text += " The balanced layer keeps exactly these values, so the line after the cut lies on the one before."
    return text


def _score_picture(
    report: Report, series: Sequence[tuple[Run, Points]], title: str, caption: str, axis: str
) -> Picture | None:
    if not any(y is not None for _, points in series for _, y in points):
        return None
    latest = max(x for _, points in series for x, _ in points)
    unit, seconds = next((u, s) for u, s in (("h", 3600.0), ("min", 60.0), ("s", 1.0)) if latest > 3 * s or s == 1.0)
    scale = seconds if axis == "time" else 1.0
    metric = report.measure
    name = f"{metric.watched} {metric.name}"
    with canvas() as (figure, ax):
        for run, points in series:
            shown = [(x / scale, None if y is None else metric.factor * y) for x, y in points]
            draw_run(ax, run, shown, marker=look(run.name).marker, markersize=2.6)
        words = f"{name}, %" if metric.higher_is_better else f"{name}, less is better"
        finish(figure, ax, report, words, f"training time, {unit}" if axis == "time" else axis)
        svg = svg_of(figure)
    return Picture(f"{name.capitalize()} {title}", caption, svg)


def _scores(report: Report, run: Run) -> list[tuple[float, float | None]]:
    points = [(e.step, 2, report.score(e)) for e in run.evaluations]
    for cut in run.reductions:
        points += [(cut.step, side, value) for side, value in enumerate(report.around(cut))]
    return [(step, y) for step, _, y in sorted(points, key=lambda point: point[:2]) if y is not None]


def _states(run: Run) -> list[tuple[float, int]]:
    points = [(0, 0, sum(run.initial_states))] if run.initial_states else []
    points += [(p.step, 0, sum(p.states)) for p in run.curve if p.states]
    for cut in run.reductions:
        points += [(cut.step, 1, sum(layer.rank_after for layer in cut.layers))] if cut.layers else []
    end = max([run.steps, *(p.step for p in run.curve)])
    points += [(end, 2, sum(run.final_states))] if run.final_states else []
    totals = [(step, total) for step, _, total in sorted(points, key=lambda point: point[:2])]
    changes = [now for before, now in pairwise([(-1, -1), *totals]) if now[1] != before[1]]
    return [*changes, totals[-1]] if totals else []


# What the page says where a picture has no data ({score}: what is measured), and the picture.
PICTURES: dict[str, Callable[[Report], Picture | None]] = {
    "No {score} by step: the report holds no evaluations.": score,
    "No {score} by time: the report holds no evaluations, or no step times.": score_by_time,
    "No training loss: the report holds no curve.": loss,
    "No step times: the report holds no curve.": step_time,
    "No states by step: the report does not say them.": states,
}
