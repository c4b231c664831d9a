"""Words and tables about whole training steps: from full to compressed size, and every contender's own gain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from compressm.benchmarking.results import Run

from .analysis import OURS, Shrinking, contenders, shrinking_steps
from .wording import NONE, escape, number, once, percent, plain_name, sizes, table, times, timing, whole

REMARKS = {"scifar": "The sCIFAR model of the paper has 6 blocks and batch 50; the sizes that were timed stand under its name."}
POOR_LINE = 0.1  # by which a line may miss a time before the report says so


def headline(found: Mapping[str, Sequence[Shrinking]], titles: Mapping[str, str]) -> list[str]:
    """Every training step from full to compressed size, next to what was published."""
    lines = ["## Training steps: from full to compressed size", ""]
    rows = []
    for name, steps in found.items():
        for step in steps:
            if step.contender == OURS:
                rows += _headline_rows(step, titles[name] if len(found) > 1 else "")
    if not rows:
        return [*lines, "No training step was timed at two state sizes.", ""]
    headings = ("whole training step", "states", "ms", "speed-up", "published", "independent of N")
    lines += table(headings, rows)
    return [
        *lines,
        "A step is data, forward, backward and optimizer; in brackets the spread, or *once* for a single round. *Independent of"
        " N* is the share of the full step that a straight line through the times leaves at N = 0, and the speed-up that no"
        " compression can pass for it. A fast full size makes the ratio small.",
        "",
        "*Published* is what the authors of CompreSSM announced for training on their machines with their code: up to 1.5x in"
        " image classification (CIFAR-10), about 4x with Mamba from 128 to about 12 states. Here one step is timed.",
        "",
        *_remarks(found),
    ]


def _headline_rows(step: Shrinking, title: str) -> list[list[str]]:
    full = step.results[0]
    fixed = sizes(full.shape, leave_out="states")
    name = f"**{plain_name(step.op)}**" + (f"<br>{whole(escape(fixed))}" if fixed != NONE else "")
    name += f", {step.dtype}" if step.dtype != "float32" else ""
    name += f"<br>{title}" if title else ""
    share, most = step.independent_share, step.most
    part = NONE if share is None else percent(share) + ("" if math.isinf(most) else f", at most {number(most)}x")
    rows = [[name, str(full.shape["states"]), timing(full), "1", NONE, whole(part)]]
    for result in step.results[1:]:
        states = result.shape["states"]
        published = step.published.words if step.published and step.published.states(step) == states else NONE
        change = whole(f"{full.shape['states']} → {states}")
        gain = times(step.speed_up(result), once(full, result))
        rows.append(["", change, timing(result), f"**{gain}**", whole(published), ""])
    return rows


def _remarks(found: Mapping[str, Sequence[Shrinking]]) -> list[str]:
    """What a reader has to know of single steps: their model, and where the line does not fit."""
    steps = [step for of in found.values() for step in of if step.contender == OURS]
    remarks = [REMARKS[op] for op in dict.fromkeys(step.op for step in steps) if op in REMARKS]
    remarks += [
        f"The line of {plain_name(step.op)} misses a time by {percent(step.line.miss)}: take its share as a rough figure."
        for step in steps
        if step.line is not None and step.line.miss > POOR_LINE
    ]
    return [line for remark in remarks for line in (remark, "")]


def own_speed_ups(run: Run) -> list[str]:
    """Every contender's training step from its own full size to smaller ones."""
    by_model: dict[str, list[Shrinking]] = {}
    for step in shrinking_steps(run):
        where = f"{plain_name(step.op)}, {whole(escape(sizes(step.results[0].shape, leave_out='states')))}"
        by_model.setdefault(where, []).append(step)
    by_model = {where: steps for where, steps in by_model.items() if len(steps) > 1}
    names = contenders(step.results[0] for steps in by_model.values() for step in steps)
    rows = []
    for where, steps in by_model.items():
        cells: dict[tuple[int, int], dict[str, str]] = {}
        for step in steps:
            full = step.results[0].shape["states"]
            for result in step.results[1:]:
                change = cells.setdefault((full, result.shape["states"]), {})
                change[step.contender] = f"{number(step.speed_up(result).value)}x"
        for (full, states), by_name in sorted(cells.items(), reverse=True):
            rows.append([where, whole(f"{full} → {states}"), *(by_name.get(name, NONE) for name in names)])
    if not rows:
        return []
    words = "Speed-up of every contender over its own full size. It is large where the full size is slow."
    return [words, "", *table(("training step", "states", *map(escape, names)), rows)]
