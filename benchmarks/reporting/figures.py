"""The report's pictures: PNG, the same bytes for the same figures, sized for a page on GitHub, legible to colour-blind eyes."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from compressm.benchmarking.results import Result

from .analysis import AXES, OURS, Curve, Group, Shrinking, computations, is_ours
from .wording import LETTERS, RESOURCES, manner, number, op_name, short, sizes

WIDTH = 8.0  # inches
DPI = 150
COLOURS = 128  # of the palette that a picture is stored with
MAX_ROWS = 28  # of a picture of ratios
INK, SOFT, LINE = "#1b1f24", "#57606a", "#d8dee4"
OUR_COLOUR = "#0072b2"
PEER_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b7480", "#882255", "#8c510a")
OUR_MARKERS, PEER_MARKERS = "ohp8", "s^Dv<>XP*"
UNTOUCHED = "#c3cad1"  # what no compression takes away
NOT_SPLIT = "#7fb2d6"  # times of too few sizes for a line
PUBLISHED_LOOK = {"marker": "D", "markersize": 6.5, "markerfacecolor": "white", "markeredgewidth": 1.5}
LIMIT_LOOK = {"color": SOFT, "linestyle": (0, (2, 1.5)), "linewidth": 1.1, "zorder": 1.5}
RESOURCE_LOOK = {"bytes": ("#0072b2", "o"), "flops": ("#e69f00", "s"), "exponentials": ("#009e73", "^")}
STYLE = {
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), SOFT),
    **dict.fromkeys(("axes.titlecolor", "text.color"), INK),
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "errorbar.capsize": 2.5,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
}


def looks(names: Sequence[str]) -> dict[str, dict[str, object]]:
    """Colour, marker and dashes of every contender, by order of appearance: no two alike among fifty."""
    found: dict[str, dict[str, object]] = {}
    ours = peers = 0
    for name in names:
        if is_ours(name):
            dashes = "-" if ours == 0 else (0, (1, 1.3))
            found[name] = {"color": OUR_COLOUR, "marker": OUR_MARKERS[ours % len(OUR_MARKERS)], "linestyle": dashes}
            ours += 1
        else:
            dashes = ("-", (0, (4, 1.5)), (0, (1, 1.2)))[peers // len(PEER_COLOURS) % 3]
            marker = PEER_MARKERS[peers % len(PEER_MARKERS)]
            found[name] = {"color": PEER_COLOURS[peers % len(PEER_COLOURS)], "marker": marker, "linestyle": dashes}
            peers += 1
    return found


def steps(found: Sequence[Shrinking]) -> bytes:
    """Time of every training step by number of states, and the part of it that no compression takes away."""
    rows, columns = _grid(len(found), 3)
    most = max(len(step.results) for step in found)
    with _figure(rows, columns, 0.85 + 0.3 * most) as (figure, axes):
        for ax, step in zip(axes, found, strict=False):
            _step(ax, step)
        handles = []
        if any(step.line for step in found):
            handles.append(Patch(color=OUR_COLOUR, label="grows with N"))
            handles.append(Patch(color=UNTOUCHED, label="independent of N, by a line"))
        if any(step.line is None for step in found):
            handles.append(Patch(color=NOT_SPLIT, label="two sizes: no line"))
        if any(step.published for step in found):
            words = "full size over the published speed-up"
            handles.append(Line2D([], [], color=INK, linestyle="", label=words, **PUBLISHED_LOOK))
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
        return _png(figure)


def _step(ax: Axes, step: Shrinking) -> None:
    full = step.results[0].milliseconds.median
    for y, result in enumerate(step.results):
        t = result.milliseconds
        constant = 0.0 if step.line is None else min(max(step.line.constant, 0.0), t.median)
        ax.barh(y, constant, color=UNTOUCHED, height=0.66)
        ax.barh(y, t.median - constant, left=constant, color=OUR_COLOUR if step.line else NOT_SPLIT, height=0.66)
        ax.errorbar(t.median, y, xerr=[[t.median - t.low], [t.high - t.median]], color=INK, elinewidth=1.1)
        end, gap = t.high, 5
        if step.published and step.published.states(step) == result.shape["states"]:
            expected = full / step.published.factor
            ax.plot(expected, y, color=INK, zorder=5, **PUBLISHED_LOOK)
            end, gap = (expected, 8) if expected > end else (end, gap)
        words = f"{number(t.median)} ms" + (f"   {number(step.speed_up(result).value)}x" if y else "")
        ax.annotate(words, (end, y), xytext=(gap, 0), textcoords="offset points", va="center", fontsize=8.5)
    ax.set_yticks(range(len(step.results)), [str(result.shape["states"]) for result in step.results])
    ax.set_ylim(len(step.results) - 0.4, -0.6)
    ax.set_xlim(0, 1.7 * max(r.milliseconds.high for r in step.results))
    dtype = "" if step.dtype == "float32" else f", {step.dtype}"
    ax.set_title(op_name(step.op) + dtype + ("" if step.contender == OURS else f"\n{step.contender}"))
    ax.set_ylabel("states N")
    ax.set_xlabel("ms per step")
    ax.grid(axis="y", visible=False)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.xaxis.set_major_formatter(FuncFormatter(_plain))


def ratios(found: Sequence[Group], styles: dict[str, dict[str, object]]) -> bytes:
    """Every other contender's time over ours, a row per computation; at most MAX_ROWS, the first ones."""
    rows = sorted([group for group in found if group.ratios()][:MAX_ROWS], key=lambda group: group.first.passes)
    with _figure(1, 1, 0.95 + 0.27 * len(rows)) as (figure, (ax,)):
        seen = {}
        for y, group in enumerate(rows):
            found_here = group.ratios()
            for i, (name, spread) in enumerate(found_here.items()):
                at = y + (i - (len(found_here) - 1) / 2) * min(0.13, 0.6 / len(found_here))
                seen[name] = styles[name]
                error = [[spread.value - spread.low], [spread.high - spread.value]]
                look = {**styles[name], "linestyle": "", "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.6}
                ax.errorbar([spread.value], [at], xerr=error, elinewidth=1.3, **look)
        for y in range(1, len(rows)):
            ax.axhline(y - 0.5, color=LINE, linewidth=0.7)
        ax.axvline(1, color=OUR_COLOUR, linewidth=2.2, zorder=1)
        _log(ax, "x")
        low, high = ax.get_xlim()
        ax.set_xlim(min(low, 0.8), max(high, 1.25))
        ax.axvspan(ax.get_xlim()[0], 1, color="#d55e00", alpha=0.07, linewidth=0)
        ax.set_yticks(range(len(rows)), [f"{manner(group.first)}   {short(group)}" for group in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("time of a peer over compressm's, log scale (shaded: the peer is faster)")
        handles = [Line2D([], [], color=OUR_COLOUR, linewidth=2.2, label=OURS)]
        handles += [Line2D([], [], **{**styles[name], "linestyle": ""}, label=name) for name in _contenders_in(styles, seen)]
        _legend(figure, handles)
        return _png(figure)


def _contenders_in(styles: dict[str, dict[str, object]], seen: dict[str, object]) -> list[str]:
    """Names that occur, in the order of the styles."""
    return [name for name in styles if name in seen]


def limits(found: Sequence[Group]) -> bytes:
    """Share of the physical limit that ours and the best peer reach, a row per op and pass, a dot per shape."""
    rows = [(key, of) for key, of in computations(found).items() if any(_share(group.ours) is not None for group in of)]
    with _figure(1, 1, 0.95 + 0.3 * len(rows)) as (figure, (ax,)):
        bound = set()
        for y, (_, of) in enumerate(rows):
            for group in of:
                peers = [share for r in group.results if not is_ours(r.contender) and (share := _share(r)) is not None]
                if peers:
                    ax.plot(100 * max(peers), y, marker="|", color=INK, markersize=15, markeredgewidth=1.4, zorder=2)
                if (share := _share(group.ours)) is not None:
                    bound.add(group.ours.limit_by)
                    colour, marker = RESOURCE_LOOK.get(group.ours.limit_by, (INK, "D"))
                    edge = {"markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.6}
                    ax.plot(100 * share, y, marker=marker, color=colour, zorder=3, **edge)
        ax.axvline(100, color=INK, linewidth=1.2)
        labels = [(op_name(of[0].first.op), manner(of[0].first)) for _, of in rows]
        ax.set_yticks(range(len(rows)), [", ".join(filter(None, words)) for words in labels])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_xlim(0, max(105.0, ax.get_xlim()[1]))
        ax.set_xlabel("share of the physical limit reached, %")
        handles = [
            Line2D([], [], color=colour, marker=marker, linestyle="", label=f"compressm, limit set by {RESOURCES[name]}")
            for name, (colour, marker) in RESOURCE_LOOK.items() if name in bound
        ]  # fmt: skip
        tick = {"marker": "|", "linestyle": "", "markersize": 12, "markeredgewidth": 1.4}
        handles.append(Line2D([], [], color=INK, label="fastest peer", **tick))
        _legend(figure, handles)
        return _png(figure)


def _share(result: Result | None) -> float | None:
    return None if result is None else result.share_of_limit


def scaling(found: Sequence[Sequence[Curve]], styles: dict[str, dict[str, object]]) -> bytes:
    """Times of one op along each axis, a panel per family of curves."""
    rows, columns = _grid(len(found), 3)
    with _figure(rows, columns, 2.75) as (figure, axes):
        seen, limited = {}, False
        for ax, family in zip(axes, found, strict=False):
            for curve in reversed(family):
                name = curve.results[0].contender
                seen[name] = styles[name]
                wide = {"linewidth": 2.2, "zorder": 4} if name == OURS else {"linewidth": 1.4}
                _bars(ax, curve.sizes, curve.results, {**styles[name], "markersize": 4.5, **wide})
            first = family[0]
            limits = [(size, r.limit_ms) for size, r in zip(first.sizes, first.results, strict=True) if r.limit_ms is not None]
            if limits:
                ax.plot(*zip(*limits, strict=True), **LIMIT_LOOK)
                limited = True
            _log(ax, "x", ticks=sorted({size for curve in family for size in curve.sizes}))
            _log(ax, "y")
            ax.set_title(f"{manner(first.results[0])}\n{sizes(first.fixed)}", fontsize=9)
            letter = LETTERS.get(first.axis, "")
            ax.set_xlabel(f"{first.axis} {letter}, log scale".replace(" ,", ","))
        for ax in axes[::columns]:
            ax.set_ylabel("ms, log scale")
        handles = [Line2D([], [], **styles[name], label=name) for name in _contenders_in(styles, seen)]
        _legend(figure, handles + ([Line2D([], [], **LIMIT_LOOK, label="physical limit")] if limited else []))
        return _png(figure)


def widest(found: Sequence[Sequence[Curve]]) -> list[Sequence[Curve]]:
    """Of every pass, dtype and axis the family with the most points: what is drawn where there are several."""
    best: dict[tuple[str, str, str], Sequence[Curve]] = {}
    for family in found:
        first = family[0].results[0]
        key = (first.passes, first.dtype, family[0].axis)
        if key not in best or sum(len(c.results) for c in family) > sum(len(c.results) for c in best[key]):
            best[key] = family
    return sorted(best.values(), key=lambda family: (family[0].results[0].passes, AXES.index(family[0].axis)))


def _bars(ax: Axes, x: Sequence[int], results: Sequence[Result], look: dict[str, object]) -> None:
    y = [r.milliseconds.median for r in results]
    down, up = zip(*[(t.median - t.low, t.high - t.median) for t in (r.milliseconds for r in results)], strict=True)
    ax.errorbar(x, y, yerr=[down, up], elinewidth=1.2, **look)


def _log(ax: Axes, which: str, ticks: Sequence[float] = ()) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5, or at the measured sizes."""
    (ax.set_xscale if which == "x" else ax.set_yscale)("log")
    axis = ax.xaxis if which == "x" else ax.yaxis
    low, high = ax.get_xlim() if which == "x" else ax.get_ylim()
    if ticks:
        apart = [tick for i, tick in enumerate(ticks) if i == 0 or tick >= 1.5 * ticks[i - 1] or len(ticks) <= 5]
        axis.set_ticks(apart)
    else:
        decades = math.log10(high / low)
        axis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2.5 else (1.0, 2.0, 5.0) if decades > 0.6 else range(1, 10)))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_locator(NullLocator())


def _plain(value: float, _: int) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def _legend(figure: Figure, handles: list[Line2D]) -> None:
    longest = max(len(handle.get_label()) for handle in handles)
    figure.legend(handles=handles, loc="outside upper left", ncols=max(1, min(len(handles), int(105 / (longest + 7)))))


def _grid(panels: int, most: int) -> tuple[int, int]:
    columns = min(panels, most)
    return -(-panels // columns), columns


@contextmanager
def _figure(rows: int, columns: int, height: float) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure in the report's style and its panels; characters that the font lacks are no reason to warn."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(WIDTH, 0.5 + height * rows), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        yield figure, axes


def _png(figure: Figure) -> bytes:
    """The picture stored with a palette, which drops the drawing program's name too."""
    for ax in figure.axes:
        if not ax.has_data():
            ax.set_visible(False)
    drawn, stored = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    drawn.seek(0)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(stored, format="PNG", optimize=True)
    return stored.getvalue()
