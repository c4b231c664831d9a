"""A comparison in words: a sentence for each pair, and the tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from compressm.experiments.comparing.results import Arm, Comparison, Pair
from compressm.experiments.comparing.statistics import LEVEL, Estimate
from compressm.experiments.reports.data import clean
from compressm.experiments.reports.summary import duration, listed, milliseconds, significant, whole
from compressm.experiments.tasks.metrics import MISSING, Metric

PERCENT = f"{100 * LEVEL:.0f} %"


def capital(text: str) -> str:
    """A capital first."""
    return text[:1].upper() + text[1:]


def estimated(metric: Metric, value: Estimate | None) -> str:
    """``-41.52 ± 1.30``: mean and standard error."""
    if value is None:
        return MISSING
    return metric.number(value.mean) + ("" if value.error is None else f" ± {spread(metric, value.error)}")


def spread(metric: Metric, value: float) -> str:
    """A standard error or half an interval as the metric's numbers are written."""
    return f"{metric.factor * value:.{metric.digits}f}"


def interval(metric: Metric, pair: Pair) -> str:
    """``-8.10 to -2.30``; a dash of a single pair."""
    gap = pair.difference
    return MISSING if gap.low is None else f"{metric.signed(gap.low)} to {metric.signed(gap.high)}"


def p_value(pair: Pair) -> str:
    """``0.012``, ``<0.001``; a dash of a single pair."""
    if pair.difference.error is None:
        return MISSING
    return "<0.001" if pair.p < 0.001 else f"{pair.p:.3f}"


def sentence(comparison: Comparison, pair: Pair) -> str:
    """``Compressed in training is better than full size: by 5.20 dB (95 % interval ...).``"""
    metric, gap = comparison.metric, pair.difference
    ours, theirs = (clean(comparison.arm(name).title) for name in (pair.ours, pair.theirs))
    if gap.error is None:
        known = f"{metric.signed(gap.mean)} {metric.gap_unit} with the one seed that they share, which says nothing of others"
        return f"{capital(ours)} and {theirs}: not resolved; {known}."
    p = "p < 0.001" if pair.p < 0.001 else f"p = {p_value(pair)}"
    evidence = f"{PERCENT} interval {interval(metric, pair)}, {gap.count} seeds, {p} after correction"
    if pair.verdict == "not resolved":
        return f"{capital(ours)} and {theirs}: not resolved; {metric.signed(gap.mean)} {metric.gap_unit} ({evidence})."
    amount = f"{abs(metric.rounded(gap.mean)):.{metric.digits}f} {metric.gap_unit}"
    return f"{capital(ours)} is {pair.verdict} than {theirs}: by {amount} ({evidence})."


def states(arm: Arm) -> str:
    """``12``, or ``9-14`` where runs differ."""
    low, high = min(arm.states), max(arm.states)
    return str(low) if low == high else f"{low}-{high}"


def tables(comparison: Comparison) -> Group:
    """What every method reached, how the first differs from the others, and the sentences; within 100 columns."""
    lines = [Text(sentence(comparison, pair)) for pair in comparison.pairs]
    notes = [Text(note, style="dim") for note in remarks(comparison)]
    pairs = [pairs_table(comparison)] if comparison.pairs else []
    return Group(results_table(comparison), costs_table(comparison), *pairs, *lines, *notes)


def results_table(comparison: Comparison) -> Table:
    """How good every method became, and how soon."""
    metric, quality = comparison.metric, comparison.quality
    caption = f"{metric.heading}: mean and standard error on the test set"
    if quality is not None:
        caption += f"; steps, time: until {metric.text(quality)}"
    title = clean(comparison.entries[0].title) or comparison.design.preset
    return _methods(comparison, title, caption, ("lr", "seeds", metric.heading, "steps", "time"), qualities)


def costs_table(comparison: Comparison) -> Table:
    """What every method costs."""
    caption = "states, bytes of them, parameters, ms per step: of the final model; train: all steps and reductions"
    return _methods(comparison, "Costs", caption, ("states", "bytes", "params", "ms/step", "train"), costs)


def qualities(comparison: Comparison, arm: Arm) -> list[str]:
    """Multiple of the learning rate, seeds, score, steps and time until a quality."""
    count, steps, seconds = (0, None, None) if comparison.quality is None else arm.to_quality(comparison.quality)
    total = len(arm.entries)
    some = f" ({count})" if 0 < count < total else ""
    return [
        f"x{arm.multiple:g}" + "*" * arm.at_the_edge,
        str(total) + (f" ({arm.diverged} diverged)" if arm.diverged else ""),
        estimated(comparison.metric, arm.score),
        _rounded(steps) + some,
        _clock(seconds),
    ]


def costs(comparison: Comparison, arm: Arm) -> list[str]:
    """States, their bytes, parameters, milliseconds per step, time of training."""
    return [
        states(arm),
        _rounded(arm.mean("state_bytes")),
        _rounded(arm.mean("parameters")),
        MISSING if arm.step is None else milliseconds(arm.step.median),
        _clock(arm.mean("seconds_training")),
    ]


def pairs_table(comparison: Comparison) -> Table:
    """A line for each pair."""
    metric = comparison.metric
    more = "more is better" if metric.higher_is_better else "less is better"
    corrected = f"corrected for {len(comparison.pairs)} comparisons (Holm), which intervals are not"
    caption = f"p: paired t-test, {corrected}; {more}"
    same = len({pair.ours for pair in comparison.pairs}) == 1
    minus = f" of {clean(comparison.arm(comparison.pairs[0].ours).title)}" if same else ""
    table = _table(f"Paired differences{minus}, {metric.gap_unit}", caption)
    table.add_column("minus" if same else "pair", overflow="fold", min_width=20, max_width=40)
    for heading in ("seeds", "difference", f"{PERCENT} interval", "p", "verdict"):
        table.add_column(heading, justify="right", no_wrap=True)
    for pair in comparison.pairs:
        ours, theirs = comparison.arm(pair.ours).title, comparison.arm(pair.theirs).title
        name = theirs if same else f"{ours} - {theirs}"
        gap = metric.signed(pair.difference.mean)
        table.add_row(
            Text(clean(name)), str(pair.difference.count), gap, interval(metric, pair), p_value(pair), pair.verdict
        )
    return table


def remarks(comparison: Comparison) -> list[str]:
    """What the reader must know beside the numbers."""
    design, found = comparison.design, []
    if comparison.missing:
        count = f"{comparison.missing} of {len(design.report_jobs())} runs"
        found.append(f"Not complete: {count} are missing; the same command goes on with them.")
    if design.multiples:
        multiples = ", ".join(f"{multiple:g}" for multiple in design.multiples)
        found.append(
            f"lr: multiple of the preset's learning rate, the best of {multiples} by the mean over {design.tuning_seeds} other "
            "seeds, on examples held out of training."
        )
        if edge := [arm.title for arm in comparison.arms if arm.at_the_edge]:
            found.append(f"*: the end of the range that was tried, others may be better still ({', '.join(edge)}).")
    else:
        found.append("No learning rate was tuned (--tune): all methods trained with the preset's, which may suit one more.")
    teachers = [arm.title for arm in comparison.arms if any(entry.seconds_teachers for entry in arm.entries)]
    if teachers:
        found.append(f"Training time of {listed(teachers)} includes that of the teacher.")
    if comparison.quality is not None and any(_some_reached(arm, comparison.quality) for arm in comparison.arms):
        found.append("(n): only so many of the runs became that good; steps and time are their means.")
    return found + [clean(note) for note in dict.fromkeys(note for entry in comparison.entries for note in entry.notes)]


def _methods(
    comparison: Comparison,
    title: str,
    caption: str,
    headings: Sequence[str],
    cells: Callable[[Comparison, Arm], list[str]],
) -> Table:
    """A line for each method."""
    table = _table(title, caption)
    table.add_column("method", overflow="fold", min_width=20, max_width=36)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for arm in comparison.arms:
        table.add_row(Text(clean(arm.title)), *cells(comparison, arm))
    return table


def _some_reached(arm: Arm, quality: float) -> bool:
    return 0 < arm.to_quality(quality)[0] < len(arm.entries)


def _table(title: str, caption: str) -> Table:
    return Table(title=Text(title), caption=Text(caption), box=box.SIMPLE, padding=(0, 0, 0, 1), pad_edge=False)


def _rounded(value: float | None) -> str:
    if value is None or value < 10_000:
        return whole(None if value is None else round(value))
    return f"{significant(value / 1e3)}k" if value < 999_500 else f"{significant(value / 1e6)}M"


def _clock(seconds: float | None) -> str:
    return duration(seconds).replace(" min ", "m").replace(" h ", "h").replace(" ", "")
