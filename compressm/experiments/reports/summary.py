"""A report in words: how numbers are written, the headline, and the table for the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from compressm.experiments.methods import METHODS
from compressm.experiments.reports.comparison import Row, rows
from compressm.experiments.reports.data import Report, clean, parse_report
from compressm.experiments.tasks.metrics import ACCURACY, MISSING, Metric


def duration(seconds: float | None) -> str:
    """Seconds in the unit that fits: ``850 ms``, ``14.2 s``, ``23 min 05 s``, ``5 h 12 min``."""
    if seconds is None:
        return MISSING
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def milliseconds(seconds: float | None) -> str:
    """Three significant digits, without the unit."""
    return MISSING if seconds is None else significant(1e3 * seconds)


def significant(value: float | None, digits: int = 3) -> str:
    """Rounded to significant digits, without an exponent between 0.001 and a million."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    text = f"{value:.{digits - 1}e}"
    exponent = int(text.partition("e")[2])
    if not -3 <= exponent < 6:
        return text
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def ratio(value: float | None) -> str:
    """1.742 -> ``1.74x``."""
    return MISSING if value is None else f"{significant(value)}x"


def whole(value: int | None) -> str:
    """With thousands separated."""
    return MISSING if value is None else f"{value:,}"


def states(values: Sequence[int], listed: int = 3, *, short: bool = False) -> str:
    """States per layer: each if there are at most ``listed``, else how many layers and their range."""
    if not values:
        return MISSING
    if len(values) > 1 and len(set(values)) == 1:
        return f"{len(values)} x {values[0]}"
    if len(values) <= listed:
        return ", ".join(map(str, values))
    return f"{min(values)}..{max(values)}" + ("" if short else f" in {len(values)} layers")


def layer_count(values: Sequence[int]) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{len(values)} layer" + "s" * (len(values) != 1)


def headline(report: Mapping[str, Any] | Report) -> str:
    """The gain in one or two sentences; what the report does not hold is left out.

    Raises:
        DataError: not a report.
    """
    report = parse_report(report)
    table = {row.name: row for row in rows(report)}
    run, full = report.main, None if report.reference is None else table[report.reference.name]
    row = table[run.name]
    quality, time = _quality(row, table, report.measure), _time(row, full)
    if run.diverged:
        return f"{row.title}: training diverged, its loss is no longer a number."
    size = _size(row, run.initial_states, run.final_states)
    first = f"{size}: {quality or time or 'the report holds no results'}."
    return f"{first} {time[0].upper()}{time[1:]}." if quality and time else first


def origin(command: str, dataset: Mapping[str, Any], seeds: Sequence[int | None]) -> str:
    """``compressm train digits; data: handwritten digits; seed 0``, without what is not known."""
    parts, name = [command], clean(str(dataset.get("name", "")))
    parts += [f"data: {name}"] if name else []
    if known := sorted({seed for seed in seeds if seed is not None}):
        parts.append(f"seed{'s' * (len(known) > 1)} {listed([str(seed) for seed in known])}")
    return "; ".join(part for part in parts if part)


def step_note(report: Report) -> str:
    """How the milliseconds per step were measured."""
    lines = [row for row in rows(report) if row.step_seconds is not None]
    if not lines:
        return "no step times were measured"
    rounds = f", {report.timing.repeats} rounds" if report.timing and report.timing.repeats else ""
    in_turn = f"median of the final models timed in turn (interleaved{rounds})"
    alone = "median while each run trained, not interleaved"
    if all(row.interleaved for row in lines):
        return in_turn
    return f"{in_turn}; *: {alone}" if any(row.interleaved for row in lines) else alone


def sampling_noise(report: Report) -> float | None:
    """Smallest difference of two test accuracies that chance would exceed in only 5 % of cases; None where unknown."""
    size, accuracies = report.dataset.get("test"), [row.score for row in rows(report) if row.score is not None]
    if report.measure is not ACCURACY or not isinstance(size, int) or size < 1 or len(accuracies) < 2:
        return None
    middle = min(1.0, max(0.0, sum(accuracies) / len(accuracies)))
    return 1.96 * math.sqrt(2 * middle * (1 - middle) / size)


def paired_gaps(report: Report) -> list[str]:
    """``+0.011 ± 0.004 from the full-size run``, ...: how the main run's bits per byte differ from every control's.

    The mean over the test windows of the differences, and 1.96 times its standard error.
    """
    own, texts = report.main, []
    for name, method in METHODS.items():  # all of them, also those that do better
        other = report.run(name)
        if other is None or other is own:
            continue
        ours, theirs = own.final.window_bits, other.final.window_bits
        if len(ours) == len(theirs) > 1:
            gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
            half, metric = 1.96 * statistics.stdev(gaps) / math.sqrt(len(gaps)), report.measure
            texts.append(f"{metric.signed(statistics.fmean(gaps))} ± {half:.{metric.digits}f} from {method.phrase}")
    return texts


def summary_table(report: Mapping[str, Any] | Report) -> Table:
    """The comparison for a terminal: within 100 columns; in fewer, down to 80, the names of runs are folded.

    Raises:
        DataError: not a report.
    """
    report = parse_report(report)
    lines = rows(report)
    mixed = len({row.interleaved for row in lines if row.step_seconds is not None}) > 1
    title, metric = Text(clean(report.title) or "Training runs"), report.measure
    caption = f"ms/step: {step_note(report)}\n{gap_note(metric)}"
    table = Table(title=title, caption=caption, box=box.SIMPLE, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column("run", overflow="fold", max_width=24)
    for heading in ("states", metric.heading, "gap", "params", "ms/step", "speed", "train", "total"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in lines:
        mark = "*" if mixed and row.step_seconds is not None and not row.interleaved else ""
        quality = (metric.number(row.score), metric.signed(row.gap))
        cells = states(row.states, 2, short=True), *quality, _short(row.parameters), milliseconds(row.step_seconds) + mark
        table.add_row(Text(row.title), *cells, ratio(row.speed), _clock(row.seconds_training), _clock(row.seconds_total))
    return table


def gap_note(metric: Metric) -> str:
    """What the column of gaps holds."""
    if metric.higher_is_better:
        return f"gap: {metric.gap_unit} of test {metric.name} against full size"
    return f"gap: {metric.gap_unit} on the test set against full size; less is better"


def _size(row: Row, before: Sequence[int], after: Sequence[int]) -> str:
    if not before or not after:
        return row.title
    layers = layer_count(after)
    if row.name not in METHODS or not METHODS[row.name].shrinks:
        return f"{row.title} ({sum(after):,} states in {layers})"
    if sum(after) == sum(before):
        return f"Nothing was cut, the model keeps its {sum(before):,} states in {layers}"
    return f"While it trained, the model shrank from {sum(before):,} to {sum(after):,} states in {layers}"


def _quality(row: Row, table: dict[str, Row], metric: Metric) -> str:
    if row.score is None:
        return ""
    compared = []
    for name, method in METHODS.items():  # all of them, also those that do better
        other = table.get(name)
        if other is not None and other is not row and other.score is not None:
            compared.append(metric.compared(row.score - other.score, method.phrase))
    return metric.result(row.score) + (f", {listed(compared)}" if compared else "")


def listed(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _time(row: Row, full: Row | None) -> str:
    other = full if full is not None and full is not row else None
    parts = []
    if row.step_seconds is not None:
        text = f"a training step takes {milliseconds(row.step_seconds)} ms"
        if other is not None and row.speed is not None and row.interleaved == other.interleaved:
            text += f" instead of {milliseconds(other.step_seconds)} ms ({ratio(row.speed)} the speed of full size)"
        parts.append(text)
    if row.seconds_training is not None:
        text = f"training took {duration(row.seconds_training)} in all"
        if other is not None and other.seconds_training:
            change = row.seconds_training / other.seconds_training - 1
            amount = f"{abs(100 * change):.0f} % {'more' if change > 0 else 'less'}"
            text += f" instead of {duration(other.seconds_training)} ({amount})"
        parts.append(text)
    return ", and ".join(parts)


def _short(value: int | None) -> str:
    """Thousands and millions abbreviated."""
    if value is None or value < 1000:
        return whole(value)
    return f"{significant(value / 1e3)}k" if value < 999_500 else f"{significant(value / 1e6)}M"


def _clock(seconds: float | None) -> str:
    """As short as possible: ``14.2s``, ``23m05s``, ``5h12m``."""
    return duration(seconds).replace(" min", "m").replace(" ms", "ms").replace(" h", "h").replace(" s", "s").replace(" ", "")
