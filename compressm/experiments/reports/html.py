"""The report as one HTML file: pictures inside, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup

from compressm.errors import DataError
from compressm.experiments.reports import plots, summary
from compressm.experiments.reports.comparison import Row, rows
from compressm.experiments.reports.data import LayerCut, Report, Run, clean, parse_report
from compressm.experiments.reports.drawing import css_class, looks
from compressm.experiments.reports.settling import settling
from compressm.experiments.tasks.metrics import MISSING, Metric

TEMPLATE = "report.html.j2"


def write_html(report: Mapping[str, Any] | Report, path: str | Path) -> Path:
    """Write the report as a page that needs nothing but itself.

    Args:
        report: as :func:`compressm.experiments.reports.data.read_report` returns it, or parsed.
        path: of the file; its folder is made.

    Returns:
        the path.

    Raises:
        DataError: not a report, or the file cannot be written.
    """
    return write_page(render(parse_report(report)), path)


def write_page(page: str, path: str | Path) -> Path:
    """Write a page; its folder is made.

    Raises:
        DataError: it cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(page.encode("utf-8", "replace"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; expected a place where the report can be written") from error
    return path


def template(name: str) -> Template:
    """One of the templates beside this file."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(_source)
    )
    environment.filters |= {"whole": summary.whole, "svg": Markup}
    return environment.get_template(name)


def _source(name: str) -> str:
    return resources.files("compressm.experiments.reports").joinpath(name).read_text(encoding="utf-8")


def render(report: Report) -> str:
    """The page."""
    metric = report.measure
    score = f"{metric.watched} {metric.name}"
    drawn = {words.format(score=score): make(report) for words, make in plots.PICTURES.items()}
    return template(TEMPLATE).render(
        looks=looks(),
        title=clean(report.title) or "Training runs",
        origin=summary.origin(_command(report), report.dataset, [run.seed for run in report.runs]),
        score=score[0].upper() + score[1:],
        result=f"Test {metric.name}",
        gap_heading=f"Gap to full, {metric.gap_unit}" if metric.higher_is_better else "Gap to full, less is better",
        headline=_typeset(summary.headline(report)),
        tiles=_tiles(report),
        comparison=_comparison(report),
        compared=report.reference is not None and len(report.runs) > 1,
        notes=_notes(report),
        spectra=plots.spectra(report),
        settling=settling(report),
        pictures=[picture for picture in drawn.values() if picture is not None],
        missing=[words for words, picture in drawn.items() if picture is None],
        tau=_tau(report),
        reductions=[_reduction(report, run, number) for run in report.runs for number in range(len(run.reductions))],
        details=[(name, facts(values)) for name, values in _details(report).items()],
    )


def _command(report: Report) -> str:
    return f"compressm train {clean(report.preset)}" if clean(report.preset) else ""


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """Name, value and comparison of the four numbers that matter; what is missing is left out."""
    table = {row.name: row for row in rows(report)}
    run, full = report.main, None if report.reference is None else table[report.reference.name]
    row = table[run.name]
    tiles = []
    if sum(run.final_states):
        before, after = sum(run.initial_states), sum(run.final_states)
        fewer = f"{100 * (1 - after / before):.0f} % fewer, " if before > after else ""
        value = f"{before:,} → {after:,}" if before != after else f"{after:,}"
        tiles.append(("States", value, f"{fewer}{summary.layer_count(run.final_states)}"))
    if row.score is not None:
        tiles.append(_score_tile(row, report.measure))
    if row.step_seconds is not None:
        speed = "" if row is full or row.speed is None else f"{_times(row.speed)} the speed of full size"
        tiles.append(("Training step", f"{summary.milliseconds(row.step_seconds)} ms", speed))
    if row.seconds_training is not None:
        other = full.seconds_training if full is not None and full is not row else None
        less = f"{_percent_less(row.seconds_training / other)} than full size" if other else ""
        tiles.append(("Whole training", summary.duration(row.seconds_training), less))
    return tiles


def _score_tile(row: Row, metric: Metric) -> tuple[str, str, str]:
    name = f"Test {metric.name}"
    if metric.higher_is_better:
        gap = "" if row.gap is None else f"{_signed(row.gap, metric)} {metric.gap_unit} against full size"
        return name, metric.text(row.score), gap
    gap = "less is better" if row.gap is None else metric.compared(row.gap, "full size")
    return name, metric.text(row.score), gap


def _comparison(report: Report) -> list[dict[str, Any]]:
    lines = rows(report)
    mixed = len({row.interleaved for row in lines if row.step_seconds is not None}) > 1
    result, metric = [], report.measure
    for run, row in zip(report.runs, lines, strict=True):
        low, high = (summary.milliseconds(value) for value in row.step_spread or (None, None))
        result.append({
            "name": row.title,
            "class": css_class(row.name),
            "score": metric.text(row.score),
            "gap": "reference" if run is report.reference else _signed(row.gap, metric),
            "states": summary.states(row.states).replace(" x ", " × ").replace("..", "–"),
            "states_all": ", ".join(map(str, row.states)),
            "parameters": summary.whole(row.parameters),
            "step": summary.milliseconds(row.step_seconds) + "*" * (mixed and not row.interleaved),
            "spread": f"{low}–{high}" if row.step_spread else "",
            "speed": _times(row.speed),
            "training": summary.duration(row.seconds_training),
            "total": summary.duration(row.seconds_total),
            "diverged": run.diverged,
        })  # fmt: skip
    return result


def _notes(report: Report) -> list[str]:
    step = summary.step_note(report)
    notes = [f"ms per step: {step}" + ("; small: the 20 % and 80 % quantiles." if "in turn" in step else ".")]
    notes.append("Training: all steps and reductions. Total: evaluations and logging too.")
    notes.append("One run each, so without standard errors over seeds; compressm compare makes several.")
    noise = summary.sampling_noise(report)
    if noise is not None:
        size = summary.whole(report.dataset["test"])
        notes.append(
            f"With {size} test sequences, two accuracies that differ by less than {100 * noise:.1f} points may do so by chance "
            "(95 %)."
        )
    losses = [_nats(run) for run in report.runs if run.final.perplexity is not None]
    if losses:
        notes.append(f"Test loss in nats per byte, and perplexity per byte: {'; '.join(losses)}.")
    if gaps := summary.paired_gaps(report):
        count = len(report.main.final.window_bits)
        notes.append(
            f"Bits per byte on the same {count} test windows: {report.main.label} differs by "
            f"{summary.listed(gaps)} (95 %, from the scatter over windows alone; one run each, other seeds would add to it)."
        )
    return notes + [clean(note) for note in report.notes]


def _nats(run: Run) -> str:
    return f"{run.label} {summary.significant(run.final.loss, 4)}, {summary.significant(run.final.perplexity)}"


def _tau(report: Report) -> str:
    """What the configured tau is a fraction of."""
    layers = [layer for run in report.runs for cut in run.reductions for layer in cut.layers]
    names = dict.fromkeys(clean(layer.spectrum_name) for layer in layers)
    tau, attempts = report.config.get("tau"), report.config.get("attempts", 1)
    if tau is None or not names:
        return ""
    text = f"tau = {clean(str(tau))} is the fraction of the sum of Hankel singular values that may be cut, taken from the "
    text += f"{' and the '.join(names)}."
    if any(layer.changed and layer.convention == "real" for layer in layers):
        text += " A state holds a conjugate pair, two values of this spectrum, or one real mode."
    if isinstance(attempts, int) and attempts > 1:
        shared = report.config.get("recipe") != "paper"
        again = f"Each of the {attempts} attempts may cut that much again."
        text += f" All {attempts} attempts share it." if shared else f" {again}"
    return text


def _reduction(report: Report, run: Run, number: int) -> dict[str, Any]:
    cut = run.reductions[number]
    (before, after), metric, score = report.around(cut), report.measure, ""
    if before is not None or after is not None:
        score = f"{metric.watched} {metric.name} {metric.text(before)} → {metric.text(after)}"
    return {
        "step": cut.step,
        "run": run.label,
        "class": css_class(run.name),
        "score": score,
        "seconds": "" if cut.seconds is None else f"took {summary.duration(cut.seconds)}",
        "reason": clean(cut.reason),
        "layers": [_layer(layer) for layer in cut.layers],
    }


def _layer(layer: LayerCut) -> dict[str, Any]:
    bound = summary.significant(layer.error_bound)
    if layer.error_bound is None:
        bound = "none" if layer.gramians != "data-free" else "-"
    kernels = [re.sub(r" \([^()]*\)$", "", clean(plan)) for plan in (layer.kernel_plan_before, layer.kernel_plan_after)]
    return {
        "name": clean(layer.name) or "(model)",
        "changed": layer.changed,
        "ranks": f"{layer.rank_before} → {layer.rank_after}" if layer.changed else f"{layer.rank_before}, unchanged",
        "spectrum": clean(layer.spectrum_name),
        "discarded": "-" if layer.discarded is None else f"{summary.significant(100 * layer.discarded)} %",
        "bound": bound,
        "method": clean(layer.method) or "-",
        "kernels": [plan for plan in dict.fromkeys(kernels) if plan],
    }


def _details(report: Report) -> dict[str, Mapping[str, Any]]:
    return {"Configuration": report.config, "Dataset": report.dataset, "Machine": report.machine}


def facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values as text."""
    return [(clean(str(key)), clean(_plain(value))) for key, value in values.items()]


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple) and all(not isinstance(item, list | tuple | dict) for item in value):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _signed(gap: float | None, metric: Metric) -> str:
    return metric.signed(gap).replace("-", "−") if gap is not None else MISSING


def _typeset(text: str) -> str:
    """No line break between a number and its unit."""
    return re.sub(r"(?<=\d) (?=(ms|s|min|h|%|points|states)\b|%)", "\u00a0", text).replace("x the speed", "× the speed")


def _percent_less(fraction: float) -> str:
    return f"{100 * abs(1 - fraction):.0f} % {'less' if fraction <= 1 else 'more'}"


def _times(value: float | None) -> str:
    return summary.ratio(value).replace("x", "×")
