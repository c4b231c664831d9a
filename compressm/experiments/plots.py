"""The report's pictures: SVG whose colours are CSS variables, so that one picture serves light, dark and print."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from compressm.experiments.report_data import LayerCut, Report, Run, clean

# CSS variables and their values in light; report.html.j2 has those in dark. The runs' colours differ for colour-blind eyes.
THEME = {
    "ink": "#1b1f24",
    "soft": "#57606a",
    "line": "#d8dee4",
    "run-compressed": "#0072b2",
    "run-full": "#6b7480",
    "run-small": "#d55e00",
    "run-small-narrow": "#00825f",
    "run-other": "#a0478a",
}
DASHES = {"compressed": "-", "full": "-", "small": (0, (4, 1.6)), "small_narrow": (0, (1, 1.4))}
SIZE = (5.4, 3.3)  # inches; small, so that text is legible where the picture is scaled to a phone
MAX_POINTS = 400
SMOOTHED = 40  # a loss of so many points is smoothed
MAX_LABEL = 30
FLOOR = 1e-12  # singular values below this share of the largest are not drawn
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "compressm",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), THEME["soft"]),
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": THEME["line"],
    "grid.linewidth": 0.6,
    "text.color": THEME["ink"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.9,
    "legend.columnspacing": 1.2,
    "legend.borderaxespad": 0.2,
}
Points = Sequence[tuple[float, float | None]]


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


def colour(run: str) -> str:
    """Of a run, the same everywhere; one of THEME's values."""
    return THEME.get("run-" + run.replace("_", "-"), THEME["run-other"])


def spectra(report: Report) -> list[Picture]:
    """One picture per layer: its Hankel singular values before and after every cut."""
    run = next((run for run in report.runs if run.reductions), None)
    names = dict.fromkeys(layer.name for cut in run.reductions for layer in cut.layers) if run else ()
    pictures = []
    for name in names:
        cuts = [(cut.step, layer) for cut in run.reductions for layer in cut.layers if layer.name == name and layer.spectrum]
        cuts = [item for item in cuts if item[1].changed] or cuts[-1:]
        if cuts:
            pictures.append(_spectrum(name, cuts))
    return pictures


def states(report: Report) -> Picture | None:
    """States of all layers together."""
    series = [(run, _states(run)) for run in report.runs]
    if not any(points for _, points in series):
        return None
    with _drawing() as (figure, ax):
        for run, points in series:
            _line(ax, run, points, drawstyle="steps-post")
        ax.set_ylim(0, 1.06 * max(y for _, points in series for _, y in points))
        ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.yaxis.set_major_formatter(FuncFormatter(_plain))
        ends = {points[-1][1]: colour(run.name) for run, points in reversed(series) if points}
        for total, tint in ends.items():
            ax.annotate(f" {total:,}", (1, total), xycoords=ax.get_yaxis_transform(), color=tint, va="center", weight="bold")
        _finish(figure, ax, report, "states, all layers together", "step")
        svg = _svg(figure)
    return Picture("States", "The state of the whole model. It shrinks only where the compressed run is cut.", svg)


def loss(report: Report) -> Picture | None:
    """Training loss."""
    series = [(run, thin([(p.step, p.loss) for p in run.curve])) for run in report.runs]
    values = [y for _, points in series for _, y in points if y is not None]
    if not values:
        return None
    logarithmic = min(values) > 0 and max(values) > 3 * min(values)
    with _drawing() as (figure, ax):
        for run, points in series:
            if len(points) >= SMOOTHED:
                _line(ax, run, points, alpha=0.25, linewidth=0.8, linestyle="-")
                points = smooth(points, max(3, len(points) // 25))
            _line(ax, run, points)
        if logarithmic:
            _log_axis(ax)
        _finish(figure, ax, report, "training loss" + (", log scale" if logarithmic else ""), "step")
        svg = _svg(figure)
    caption = "Mean over the steps between two points"
    caption += " (thin), smoothed (thick)." if any(len(points) >= SMOOTHED for _, points in series) else "."
    if diverged := [run.label for run in report.runs if run.diverged]:
        caption += f" A line that ends early has diverged: {', '.join(diverged)}."
    return Picture("Training loss", caption, svg)


def accuracy(report: Report) -> Picture | None:
    """Test accuracy by step, with the drop at every cut."""
    series = [(run, _accuracies(run)) for run in report.runs]
    caption = "Measured on the test set."
    if any(cut.accuracy_after is not None for run in report.runs for cut in run.reductions):
        caption += " The compressed run also just before and after every cut."
    return _accuracy_picture(report, series, "Test accuracy by step", caption, "step")


def accuracy_by_time(report: Report) -> Picture | None:
    """Test accuracy by seconds of training."""
    series = []
    for run in report.runs:
        timed = [(run.elapsed(e.step), e.accuracy) for e in run.evaluations]
        series.append((run, [(t, y) for t, y in timed if t is not None]))
    caption = "Time of all steps and reductions, without evaluations."
    if len(report.runs) > 1:
        caption += " A line that ends further left trained faster."
    return _accuracy_picture(report, series, "Test accuracy by training time", caption, "time")


def step_time(report: Report) -> Picture | None:
    """Milliseconds per training step."""
    series = [(run, thin([(p.step, p.seconds_per_step) for p in run.curve], 1e3)) for run in report.runs]
    top = 1.15e3 * max(run.slowest_step for run in report.runs)
    if top <= 0:
        return None
    outside = sum(y is not None and y > top for _, points in series for _, y in points)
    with _drawing() as (figure, ax):
        for run, points in series:
            _line(ax, run, points)
        ax.set_ylim(0, top)
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        ax.yaxis.set_major_formatter(FuncFormatter(_plain))
        _finish(figure, ax, report, "ms per training step", "step")
        svg = _svg(figure)
    caption = "Mean over the steps between two points" + (", one run after the other." if len(report.runs) > 1 else ".")
    if outside:
        caption += f" {outside} point{'s' * (outside > 1)} above the picture (start-up, other load) not shown."
    return Picture("Step time", caption, svg)


def thin(points: Points, scale: float = 1.0) -> list[tuple[float, float | None]]:
    """At most MAX_POINTS points: means of neighbours, None where all of them are None."""
    width = -(-len(points) // MAX_POINTS) or 1
    result = []
    for start in range(0, len(points), width):
        part = points[start : start + width]
        numbers = [scale * y for _, y in part if y is not None]
        result.append((part[-1][0], sum(numbers) / len(numbers) if numbers else None))
    return result


def smooth(points: Points, width: int) -> list[tuple[float, float | None]]:
    """Running mean over ``width`` points around each, fewer at the ends; None stays None."""
    result, half = [], width // 2
    for index, (x, y) in enumerate(points):
        numbers = [value for _, value in points[max(0, index - half) : index + half + 1] if value is not None]
        result.append((x, None if y is None else sum(numbers) / len(numbers)))
    return result


def _spectrum(name: str, cuts: list[tuple[int, LayerCut]]) -> Picture:
    last = cuts[-1][1]
    top = max([value for _, cut in cuts for value in cut.spectrum if math.isfinite(value)], default=0.0)
    blue, many = colour("compressed"), len(cuts) > 1
    after_style = {"color": THEME["ink"], "linewidth": 1.1, "linestyle": (0, (1, 1.5))}
    with _drawing() as (figure, ax):
        for index, (_, cut) in enumerate(cuts):
            strength = 1.0 if not many else 0.4 + 0.6 * index / (len(cuts) - 1)
            kept = cut.kept_values
            values = [(i + 1, v if v > FLOOR * top else None) for i, v in enumerate(cut.spectrum)]
            _plot(ax, values[max(kept - 1, 0) :], color=THEME["soft"], linewidth=1.0, alpha=strength)
            _plot(ax, values[:kept], color=blue, linewidth=2.0, alpha=strength)
            if cut.changed:
                ax.axvline(kept + 0.5, color=blue, linewidth=1.0, linestyle=(0, (3, 2)), alpha=strength)
        if last.changed:
            ax.axvspan(last.kept_values + 0.5, len(cuts[0][1].spectrum), color=THEME["soft"], alpha=0.10, linewidth=0)
            after = [(i + 1, v if v > FLOOR * top else None) for i, v in enumerate(last.spectrum_after)]
            _plot(ax, after, **after_style)
        ax.set_xlim(1, max(2, *(len(cut.spectrum) for _, cut in cuts)))
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if top > 0:
            _log_axis(ax)
        ax.set_title("Hankel singular value, log scale", loc="left")
        ax.set_title(_kept_title(cuts), loc="right", color=blue)
        ax.set_xlabel("index, largest first")
        handles = [Line2D([], [], color=blue, linewidth=2.0, label="before, kept")]
        if last.changed:
            handles.append(Line2D([], [], color=THEME["soft"], linewidth=1.0, label="before, cut off"))
            if last.spectrum_after:
                handles.append(Line2D([], [], **after_style, label="after the cut"))
        _legend(figure, handles)
        svg = _svg(figure)
    return Picture(clean(name) or "(model)", _spectrum_caption(cuts), svg)


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
    if last.changed and list(last.spectrum_after) == list(last.spectrum[: len(last.spectrum_after)]):
        text += " The balanced layer keeps exactly these values, so the line after the cut lies on the one before."
    return text


def _accuracy_picture(
    report: Report, series: list[tuple[Run, Points]], title: str, caption: str, axis: str
) -> Picture | None:
    if not any(y is not None for _, points in series for _, y in points):
        return None
    latest = max(x for _, points in series for x, _ in points)
    unit, seconds = next((u, s) for u, s in (("h", 3600.0), ("min", 60.0), ("s", 1.0)) if latest > 3 * s or s == 1.0)
    scale = seconds if axis == "time" else 1.0
    with _drawing() as (figure, ax):
        for run, points in series:
            _line(ax, run, [(x / scale, None if y is None else 100 * y) for x, y in points], marker="o", markersize=2.6)
        _finish(figure, ax, report, "test accuracy, %", f"training time, {unit}" if axis == "time" else axis)
        svg = _svg(figure)
    return Picture(title, caption, svg)


def _accuracies(run: Run) -> list[tuple[float, float | None]]:
    points = [(e.step, 2, e.accuracy) for e in run.evaluations]
    for cut in run.reductions:
        points += [(cut.step, 0, cut.accuracy_before), (cut.step, 1, cut.accuracy_after)]
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


def _line(ax: Axes, run: Run, points: Points, **style: object) -> None:
    ranks = {"full": 2.0, "compressed": 2.5, "small": 3.0, "small_narrow": 3.5}
    look = {"color": colour(run.name), "linestyle": DASHES.get(run.name, "-"), "zorder": ranks.get(run.name, 2.2)}
    _plot(ax, points, **{**look, "linewidth": 2.1 if run.name == "compressed" else 1.5, **style})


def _plot(ax: Axes, points: Points, **style: object) -> None:
    ax.plot([x for x, _ in points], [math.nan if y is None else y for _, y in points], **style)


def _log_axis(ax: Axes) -> None:
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    decades = math.log10(high / low)
    if decades > 2.2:
        ax.yaxis.set_major_locator(LogLocator(base=10, numticks=8))
        ax.yaxis.set_major_formatter(FuncFormatter(_power))
    else:
        subs = (1.0, 2.0, 5.0) if decades > 0.7 else tuple(range(1, 10))
        ax.yaxis.set_major_locator(LogLocator(base=10, subs=subs))
        ax.yaxis.set_major_formatter(FuncFormatter(_plain))
    ax.yaxis.set_minor_locator(NullLocator())


def _plain(value: float, _: int) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _power(value: float, _: int) -> str:
    return "10" + str(round(math.log10(value))).translate(SUPERSCRIPTS) if value > 0 else ""


def _finish(figure: Figure, ax: Axes, report: Report, title: str, x: str) -> None:
    """Titles, legend, and on step axes where states were cut."""
    cuts = sorted({cut.step for run in report.runs for cut in run.reductions if cut.changed}) if x == "step" else []
    for step in cuts:
        ax.axvline(step, color=colour("compressed"), linewidth=0.9, linestyle=(0, (3, 2)), zorder=1.5)
        top = ax.get_xaxis_transform()
        ax.plot([step], [1.0], marker="v", markersize=5, color=colour("compressed"), transform=top, clip_on=False, linestyle="")
    ax.set_title(title, loc="left")
    if cuts:
        ax.set_title("▼ states cut", loc="right", color=colour("compressed"))
    ax.set_xlabel(x)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_formatter(FuncFormatter(_plain))
    ax.set_xlim(0, 1.01 * max([1e-9, *(float(value) for line in ax.lines for value in line.get_xdata())]))
    if len(report.runs) == 1:
        return
    _legend(figure, [
        Line2D([], [], color=colour(run.name), linestyle=DASHES.get(run.name, "-"), linewidth=2, label=_short(run.label))
        for run in report.runs
    ])  # fmt: skip


def _legend(figure: Figure, handles: list[Line2D]) -> None:
    longest = max(len(handle.get_label()) for handle in handles)
    columns = min(len(handles), 4 if longest < 12 else 3 if longest < 19 else 2)
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)


def _short(label: str) -> str:
    return label if len(label) <= MAX_LABEL else label[: MAX_LABEL - 1] + "…"


@contextmanager
def _drawing() -> Iterator[tuple[Figure, Axes]]:
    """A figure in the report's style, without pyplot's state; characters that the font lacks are no reason to warn."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=SIZE, layout="constrained")
        figure.patch.set_alpha(0)
        ax = figure.add_subplot()
        ax.patch.set_alpha(0)
        ax.grid(axis="x", visible=False)
        yield figure, ax


def _svg(figure: Figure) -> str:
    """The figure as an element for HTML: no prolog, metadata, namespaces, sizes and fonts; colours as CSS variables."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    head, body = text[text.index("<svg") :].split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)[0]
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    body = re.sub(r'style="[^"]*"', lambda match: _themed(match[0]), body)
    body = re.sub(r"\n\s*", "\n", body).strip()
    return f'<svg {view} role="img" stroke-linejoin="round">{body}'


def _themed(style: str) -> str:
    style = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", style)
    for name, value in THEME.items():
        style = style.replace(value, f"var(--{name}, {value})")
    return style


# What the page says where a picture has no data, and the picture.
PICTURES: dict[str, Callable[[Report], Picture | None]] = {
    "No test accuracy by step: the report holds no evaluations.": accuracy,
    "No test accuracy by time: the report holds no evaluations, or no step times.": accuracy_by_time,
    "No training loss: the report holds no curve.": loss,
    "No step times: the report holds no curve.": step_time,
    "No states by step: the report does not say them.": states,
}
