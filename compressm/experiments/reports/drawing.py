"""How the report's pictures look: SVG whose colours are CSS variables, so that one picture serves light, dark and print."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from compressm.experiments.methods import METHODS
from compressm.experiments.methods.base import UNKNOWN, Look
from compressm.experiments.reports.data import Report, Run

# CSS variables and their values in light; report.html.j2 has those in dark.
THEME = {"ink": "#1b1f24", "soft": "#57606a", "line": "#d8dee4"}
SIZE = (5.4, 3.3)  # inches; small, so that text is legible where the picture is scaled to a phone
MAX_POINTS = 400
MAX_LABEL = 30
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
STYLE: dict[Any, Any] = {
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


def look(run: str) -> Look:
    """Of a run, the same everywhere."""
    return METHODS[run].look if run in METHODS else UNKNOWN


def css_class(run: str) -> str:
    """Of a run; its CSS variable is called the same."""
    return "run-" + run.replace("_", "-") if run in METHODS else "run-other"


def looks() -> dict[str, Look]:
    """By CSS class."""
    return {**{css_class(name): method.look for name, method in METHODS.items()}, css_class(""): UNKNOWN}


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


def draw_run(ax: Axes, run: Run, points: Points, **style: Any) -> None:
    """A run's line in its look."""
    own = look(run.name)
    draw(ax, points, **{"color": own.colour, "linestyle": own.line, "zorder": own.layer, "linewidth": own.width, **style})


def draw(ax: Axes, points: Points, **style: Any) -> None:
    """A line with gaps where there is no value."""
    ax.plot([x for x, _ in points], [math.nan if y is None else y for _, y in points], **style)


def log_axis(ax: Axes) -> None:
    """A logarithmic vertical axis with ticks for its range."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    decades = math.log10(high / low)
    if decades > 2.2:
        ax.yaxis.set_major_locator(LogLocator(base=10, numticks=8))
        ax.yaxis.set_major_formatter(FuncFormatter(_power))
    else:
        subs = (1.0, 2.0, 5.0) if decades > 0.7 else tuple(range(1, 10))
        ax.yaxis.set_major_locator(LogLocator(base=10, subs=subs))
        ax.yaxis.set_major_formatter(FuncFormatter(plain))
    ax.yaxis.set_minor_locator(NullLocator())


def plain(value: float, _: int) -> str:
    """A tick's label without exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _power(value: float, _: int) -> str:
    return "10" + str(round(math.log10(value))).translate(SUPERSCRIPTS) if value > 0 else ""


def finish(figure: Figure, ax: Axes, report: Report, title: str, x: str) -> None:
    """Titles, legend, and on step axes where states were cut."""
    cuts = sorted({(cut.step, look(run.name).colour) for run in report.runs for cut in run.reductions if cut.changed})
    for step, colour in cuts if x == "step" else ():
        ax.axvline(step, color=colour, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1.5)
        top = ax.get_xaxis_transform()
        ax.plot([step], [1.0], marker="v", markersize=5, color=colour, transform=top, clip_on=False, linestyle="")
        ax.set_title("▼ states cut", loc="right", color=colour)
    ax.set_title(title, loc="left")
    ax.set_xlabel(x)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_formatter(FuncFormatter(plain))
    ax.set_xlim(0, 1.01 * max([1e-9, *(float(value) for line in ax.lines for value in np.asarray(line.get_xdata()))]))
    if len(report.runs) == 1:
        return
    legend_of_runs(figure, {run.name: _short(run.label) for run in report.runs})


def legend_of_runs(figure: Figure, labels: Mapping[str, str]) -> None:
    """A legend of runs' lines, by name."""
    styles: list[dict[str, Any]] = [{"color": look(name).colour, "linestyle": look(name).line} for name in labels]
    lines = zip(styles, labels.values(), strict=True)
    legend(figure, [Line2D([], [], **style, linewidth=2, label=label) for style, label in lines])


def legend(figure: Figure, handles: list[Line2D]) -> None:
    """A legend above the picture, in as many columns as fit."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = min(len(handles), 4 if longest < 12 else 3 if longest < 19 else 2)
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)


def _short(label: str) -> str:
    return label if len(label) <= MAX_LABEL else label[: MAX_LABEL - 1] + "…"


@contextmanager
def canvas() -> Iterator[tuple[Figure, Axes]]:
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


def svg_of(figure: Figure) -> str:
    """The figure as an element for HTML, which names it: no prolog, metadata, sizes and fonts; colours as CSS variables."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    head, body = text[text.index("<svg") :].split(">", 1)
    (view,) = re.findall(r'viewBox="[^"]*"', head)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    names = {own.colour: name for name, own in reversed(looks().items())} | {value: name for name, value in THEME.items()}
    body = re.sub(r'style="[^"]*"', lambda match: _themed(match[0], names), body)
    body = re.sub(r"\n\s*", "\n", body).strip()
    return f'<svg {view} aria-hidden="true" stroke-linejoin="round">{body}'


def _themed(style: str, names: dict[str, str]) -> str:
    """A style whose colours are CSS variables, where they have a name."""
    style = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", style)
    themed = {value: f"var(--{name}, {value})" for value, name in names.items()}
    return re.sub("#[0-9a-f]{6}", lambda match: themed.get(match[0], match[0]), style)
