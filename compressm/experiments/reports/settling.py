"""Pictures of how spectra and rankings settled in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from compressm.experiments.reports.data import LayerSettling, Report, Run, clean
from compressm.experiments.reports.drawing import THEME, Points, canvas, draw, legend, log_axis, look, plain, svg_of
from compressm.experiments.reports.plots import FLOOR, Picture

LAYERS = 4  # at most so many are shown
DASHED = (0, (3, 2))


def settling(report: Report) -> list[Picture]:
    """Spectra, drift and ranking over training, for each layer of the first run that was measured more than once."""
    run = next((run for run in report.runs if run.stability), None)
    if run is None:
        return []
    pictures = []
    for name, layer in list(run.stability.items())[:LAYERS]:
        label = f"{clean(name) or '(model)'}: "
        pictures += [_spectra(run, label, layer), _drift(run, label, layer), _ranking(run, label, layer)]
    return [picture for picture in pictures if picture is not None]


def _picture(title: str, heading: str, caption: str, draw_on: Callable[[Axes], list[Line2D]]) -> Picture:
    with canvas() as (figure, ax):
        handles = draw_on(ax)
        ax.set_title(heading, loc="left")
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(6))
        ax.xaxis.set_major_formatter(FuncFormatter(plain))
        legend(figure, handles)
        svg = svg_of(figure)
    return Picture(title, caption, svg)


def _spectra(run: Run, label: str, layer: LayerSettling) -> Picture | None:
    top = max((value for spectrum in layer.spectra for value in spectrum if value is not None), default=0.0)
    longest = max(map(len, layer.spectra), default=0)
    shown = [2**power - 1 for power in range(longest.bit_length())]
    if top <= 0:
        return None

    def lines(ax: Axes) -> list[Line2D]:
        for number, index in enumerate(shown):
            values = [s[index] if index < len(s) and (s[index] or 0.0) > FLOOR * top else None for s in layer.spectra]
            points = list(zip(layer.steps, values, strict=True))
            draw(ax, points, color=look(run.name).colour, linewidth=1.4, alpha=1 - 0.8 * number / len(shown))
        log_axis(ax)
        return [Line2D([], [], color=look(run.name).colour, linewidth=1.4, label="largest (strong) to smallest (pale)")]

    caption = f"Of {run.label}: the values number {', '.join(str(index + 1) for index in shown)} at every measuring step."
    return _picture(f"{label}spectrum over training", "Hankel singular value, log scale", caption, lines)


def _drift(run: Run, label: str, layer: LayerSettling) -> Picture | None:
    drift, bound = (list(zip(layer.steps, values, strict=True)) for values in (layer.drift, layer.bound))
    if not any(value for _, value in drift):
        return None

    def lines(ax: Axes) -> list[Line2D]:
        styles: list[tuple[str, dict[str, Any], Points]]
        styles = [("largest move", {"color": look(run.name).colour, "linewidth": 1.8}, drift)]
        if any(value for _, value in bound):
            styles.append(("Weyl's bound", {"color": THEME["soft"], "linewidth": 1.2, "linestyle": DASHED}, bound))
        for _, style, points in styles:
            draw(ax, [(step, value or None) for step, value in points], marker="o", markersize=2.4, **style)
        log_axis(ax)
        return [Line2D([], [], label=words, **style) for words, style, _ in styles]

    caption = "The largest move of a singular value since the measuring step before, and the most that Weyl's theorem allows."
    return _picture(f"{label}drift", "Drift per optimizer step, log scale", caption, lines)


def _ranking(run: Run, label: str, layer: LayerSettling) -> Picture | None:
    series = {"kept states": layer.overlap, "rank correlation": layer.correlation}
    if all(value is None for values in series.values() for value in values[:-1]):
        return None

    def lines(ax: Axes) -> list[Line2D]:
        styles: list[dict[str, Any]]
        styles = [{"color": look(run.name).colour, "linewidth": 1.8}, {"color": THEME["soft"], "linestyle": DASHED}]
        for style, values in zip(styles, series.values(), strict=True):
            draw(ax, list(zip(layer.steps, values, strict=True)), marker="o", markersize=2.4, **style)
        ax.set_ylim(min(0.0, *ax.get_ylim()), 1.02)
        return [Line2D([], [], label=words, **style) for words, style in zip(series, styles, strict=True)]

    caption = (
        "How far the ranking was the last one: the fraction of the states to keep that are kept in the end, and Spearman's "
        "rank correlation of all states, which initial decays alone make high."
    )
    return _picture(f"{label}ranking", "Agreement with the last measuring step", caption, lines)
