"""A comparison as one HTML file, in the look of a training report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressm.experiments.comparing.results import Arm, Comparison, Pair
from compressm.experiments.comparing.statistics import LEVEL
from compressm.experiments.reports import compare_words as words
from compressm.experiments.reports.compare_pictures import PICTURES
from compressm.experiments.reports.data import clean
from compressm.experiments.reports.drawing import css_class, looks
from compressm.experiments.reports.html import facts, template, write_page
from compressm.experiments.reports.summary import origin

TEMPLATE = "compare.html.j2"


def write_comparison(comparison: Comparison, path: Path) -> Path:
    """Write the page of a comparison.

    Raises:
        DataError: it cannot be written.
    """
    return write_page(render(comparison), path)


def render(comparison: Comparison) -> str:
    """The page."""
    metric, design = comparison.metric, comparison.design
    drawn = (make(comparison) for make in PICTURES)
    return template(TEMPLATE).render(
        looks=looks(),
        title=clean(comparison.entries[0].title) or design.preset,
        origin=origin(f"compressm compare {design.preset}", comparison.entries[0].dataset, _seeds(comparison)),
        sentences=[words.sentence(comparison, pair) for pair in comparison.pairs],
        headings=_headings(comparison),
        arms=[_arm(comparison, arm) for arm in comparison.arms],
        notes=words.remarks(comparison),
        unit=metric.gap_unit,
        level=words.PERCENT,
        threshold=f"{1 - LEVEL:.2f}",
        pairs=[_pair(comparison, pair) for pair in comparison.pairs],
        pictures=[picture for picture in drawn if picture is not None],
        metric=metric.name,
        multiples=[f"{multiple:g}" for multiple in design.multiples],
        tuned=[_tuned(comparison, arm) for arm in comparison.arms if arm.tuned],
        details=[(name, facts(values)) for name, values in _details(comparison).items()],
    )


def _seeds(comparison: Comparison) -> list[int]:
    return [entry.seed for entry in comparison.entries]


def _headings(comparison: Comparison) -> list[str]:
    metric = comparison.metric
    until = "a quality" if comparison.quality is None else metric.text(comparison.quality)
    result = f"Test {metric.name}" + (f", {metric.unit.strip()}" if metric.unit else "")
    names = ["Learning rate", "Seeds", result, f"Steps to {until}", f"Time to {until}"]
    return [*names, "States", "State bytes", "Parameters", "ms per step", "Training"]


def _arm(comparison: Comparison, arm: Arm) -> dict[str, Any]:
    values = [*words.qualities(comparison, arm), *words.costs(comparison, arm)]
    cells = list(zip(_headings(comparison), values, strict=True))
    return {"name": words.capital(clean(arm.title)), "class": css_class(arm.name), "cells": cells}


def _pair(comparison: Comparison, pair: Pair) -> dict[str, Any]:
    metric = comparison.metric
    return {
        "ours": words.capital(clean(comparison.arm(pair.ours).title)),
        "theirs": clean(comparison.arm(pair.theirs).title),
        "seeds": pair.difference.count,
        "difference": metric.signed(pair.difference.mean).replace("-", "−"),
        "interval": words.interval(metric, pair).replace("-", "−"),
        "p": words.p_value(pair),
        "verdict": pair.verdict,
    }


def _tuned(comparison: Comparison, arm: Arm) -> dict[str, Any]:
    scores = [
        (f"{multiple:g}", "diverged" if score is None else comparison.metric.number(score), multiple == arm.multiple)
        for multiple, score in arm.tuned.items()
    ]
    return {"name": words.capital(clean(arm.title)), "scores": scores}


def _details(comparison: Comparison) -> dict[str, Mapping[str, Any]]:
    """What the first run says of itself; where others differ, all that were found."""
    entries = comparison.entries
    first = entries[0]
    commits = dict.fromkeys(entry.commit for entry in entries if entry.commit)
    processors = dict.fromkeys(str(entry.machine.get("cpu")) for entry in entries)
    machine = {**first.machine, "cpu": ", ".join(processors), "commit": ", ".join(commits), **first.versions}
    settings = {key: value for key, value in comparison.design.base.to_dict().items() if key != "title"}
    return {"Configuration": {**settings, "seeds": comparison.design.seeds}, "Dataset": first.dataset, "Machine": machine}
