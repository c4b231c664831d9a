"""The pictures of a comparison: what every seed reached, differences with their intervals, and curves over all seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

from compressm.experiments.comparing.records import Entry
from compressm.experiments.comparing.results import Arm, Comparison
from compressm.experiments.reports.compare_words import PERCENT, capital
from compressm.experiments.reports.data import clean
from compressm.experiments.reports.drawing import THEME, canvas, legend_of_runs, log_axis, look, plain, svg_of
from compressm.experiments.reports.plots import Picture

Band = list[tuple[float, float, float, float]]  # x, mean, least and largest of all runs


def results(comparison: Comparison) -> Picture | None:
    """A point for each run, and the mean of each method with its standard error."""
    arms, metric = [(arm, arm.score) for arm in comparison.arms if arm.score is not None], comparison.metric
    if not arms:
        return None
    with canvas() as (figure, ax):
        for row, (arm, score) in enumerate(arms):
            own = look(arm.name)
            values = [metric.factor * value for value in arm.scores.values()]
            ax.plot(values, [row] * len(values), linestyle="", marker=own.marker, markersize=3.5, color=own.colour, alpha=0.45)
            half = 0.0 if score.error is None else metric.factor * score.error
            ax.errorbar(metric.factor * score.mean, row, xerr=half, color=own.colour, marker="|", markersize=11, capsize=3)
        _rows(ax, [arm.title for arm, _ in arms])
        ax.set_xlabel(f"test {_axis(comparison)}")
        svg = svg_of(figure)
    caption = "Every point is one run; the bar is the mean of its method, with the standard error."
    return Picture("Results of all seeds", caption, svg)


def differences(comparison: Comparison) -> Picture | None:
    """The mean of each pair's differences with its interval."""
    pairs = [pair for pair in comparison.pairs if pair.difference.error is not None]
    if not pairs:
        return None
    metric, same = comparison.metric, len({pair.ours for pair in pairs}) == 1
    with canvas() as (figure, ax):
        ax.axvline(0, color=THEME["soft"], linewidth=0.9)
        for row, pair in enumerate(pairs):
            gap, resolved = pair.difference, pair.verdict != "not resolved"
            colour = look(pair.theirs if same else pair.ours).colour
            ends = [metric.factor * end for end in (gap.low, gap.high) if end is not None]
            ax.plot(ends, [row, row], color=colour, linewidth=2.2 if resolved else 1.1)
            ax.plot([metric.factor * gap.mean], [row], color=colour, marker="o", markersize=6, linestyle="",
                    markerfacecolor=colour if resolved else "none")  # fmt: skip
        titles = [comparison.arm(pair.theirs).title for pair in pairs]
        ours = [comparison.arm(pair.ours).title for pair in pairs]
        _rows(ax, titles if same else [f"{a} - {b}" for a, b in zip(ours, titles, strict=True)])
        ax.set_xlabel(f"difference, {metric.gap_unit}{_direction(comparison)}")
        svg = svg_of(figure)
    subject = f"{capital(clean(ours[0]))} minus others: mean" if same else "Mean"
    caption = f"{subject} difference on the same seeds with its {PERCENT} t-interval. Filled and thick: resolved, corrected."
    return Picture("Paired differences", caption, svg)


def score_by_step(comparison: Comparison) -> Picture | None:
    """The metric while training, by step."""
    return _curves(comparison, "by step", "step", lambda entry, step: float(step))


def score_by_time(comparison: Comparison) -> Picture | None:
    """The metric while training, by seconds of training."""

    def seconds(entry: Entry, step: int) -> float | None:
        elapsed = entry.run.elapsed(step)
        return None if elapsed is None else elapsed + entry.seconds_teachers

    return _curves(comparison, "by training time", "seconds", seconds)


def loss(comparison: Comparison) -> Picture | None:
    """Training loss by step."""
    drawn = [(arm, _band(arm, lambda entry: ((p.step, p.step, p.loss) for p in entry.run.curve))) for arm in comparison.arms]
    values = [low for _, band in drawn for _, _, low, _ in band]
    if not values:
        return None
    with canvas() as (figure, ax):
        for arm, band in drawn:
            _draw(ax, arm, band)
        if logarithmic := min(values) > 0 and max(values) > 3 * min(values):
            log_axis(ax)
        _finish(figure, ax, comparison, "training loss" + (", log scale" if logarithmic else ""), "step")
        svg = svg_of(figure)
    return Picture("Training loss", "Mean over the seeds; pale: from the least to the largest of them.", svg)


def _curves(comparison: Comparison, title: str, axis: str, place: Callable[[Entry, int], float | None]) -> Picture | None:
    metric = comparison.metric

    def points(entry: Entry) -> Iterable[tuple[int, float | None, float | None]]:
        return ((e.step, place(entry, e.step), entry.value(e)) for e in entry.run.evaluations)

    drawn = [(arm, _band(arm, points)) for arm in comparison.arms]
    if not any(band for _, band in drawn):
        return None
    with canvas() as (figure, ax):
        for arm, band in drawn:
            _draw(ax, arm, [(x, metric.factor * y, metric.factor * low, metric.factor * high) for x, y, low, high in band])
        if comparison.quality is not None:
            ax.axhline(metric.factor * comparison.quality, color=THEME["soft"], linewidth=0.9, linestyle=(0, (1, 2)))
        _finish(figure, ax, comparison, f"{metric.watched} {_axis(comparison)}", axis)
        svg = svg_of(figure)
    caption = "Mean over the seeds; pale: from the least to the largest of them."
    if comparison.quality is not None:
        caption += f" Dotted: {metric.text(comparison.quality)}, until which steps and seconds are counted."
    return Picture(f"{capital(metric.watched)} {metric.name} {title}", caption, svg)


def _band(arm: Arm, points: Callable[[Entry], Iterable[tuple[int, float | None, float | None]]]) -> Band:
    """Mean and range over a method's runs at the steps where all of them have a value."""
    at: dict[int, list[tuple[float, float]]] = {}
    for entry in arm.entries:
        for step, x, y in points(entry):
            if x is not None and y is not None:
                at.setdefault(step, []).append((x, y))
    whole = {step: values for step, values in sorted(at.items()) if len(values) >= len(arm.entries)}
    band = []
    for values in whole.values():
        xs, ys = zip(*values, strict=True)
        band.append((statistics.fmean(xs), statistics.fmean(ys), min(ys), max(ys)))
    return band


def _draw(ax, arm: Arm, band: Band) -> None:
    if not band:
        return
    own, (xs, means, low, high) = look(arm.name), zip(*band, strict=True)
    if len(arm.entries) > 1:
        ax.fill_between(xs, low, high, color=own.colour, alpha=0.12, linewidth=0, zorder=own.layer - 1)
    style: dict[str, Any] = {"color": own.colour, "linestyle": own.line, "linewidth": own.width, "zorder": own.layer}
    ax.plot(xs, means, marker=own.marker if len(xs) <= 40 else "", markersize=2.6, **style)


def _finish(figure, ax, comparison: Comparison, title: str, x: str) -> None:
    ax.set_title(title, loc="left")
    ax.set_xlabel("training time, s" if x == "seconds" else x)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_formatter(FuncFormatter(plain))
    ax.set_xlim(left=0)
    legend_of_runs(figure, {arm.name: clean(arm.title) for arm in comparison.arms})


def _rows(ax, titles: list[str]) -> None:
    """A line for each method, the first on top."""
    ax.set_yticks(range(len(titles)), [clean(title) for title in titles])
    ax.set_ylim(len(titles) - 0.4, -0.6)
    ax.grid(axis="x", visible=True)
    ax.grid(axis="y", visible=False)
    ax.xaxis.set_major_locator(MaxNLocator(6))


def _axis(comparison: Comparison) -> str:
    """``accuracy, %``, ``error, dB; less is better``."""
    metric = comparison.metric
    return metric.name + (f", {metric.unit.strip()}" if metric.unit else "") + _direction(comparison)


def _direction(comparison: Comparison) -> str:
    return "" if comparison.metric.higher_is_better else "; less is better"


PICTURES: tuple[Callable[[Comparison], Picture | None], ...] = (results, differences, score_by_step, score_by_time, loss)
