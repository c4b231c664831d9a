"""The whole of a comparison: its runs, their step times, the numbers and the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from compressm.experiments.comparing.design import Design
from compressm.experiments.comparing.display import ComparisonDisplay
from compressm.experiments.comparing.execution import execute
from compressm.experiments.comparing.results import Comparison, gather, time_steps
from compressm.experiments.reports.compare_page import write_comparison
from compressm.experiments.reports.compare_words import tables
from compressm.experiments.runs import write_text

RESULT_FILE, PAGE_FILE = "compare.json", "compare.html"


def run(
    design: Design,
    out: Path,
    console: Console,
    stopped: Callable[[], bool],
    *,
    workers: int = 1,
    budget: float | None = None,
    quality: float | None = None,
    all_pairs: bool = False,
) -> Comparison | None:
    """Do what is not done yet of a comparison, and write its numbers and its page.

    Args:
        design: the comparison.
        out: the output folder.
        console: that shows how it goes on.
        stopped: becomes true to end it early.
        workers: runs at a time.
        budget: seconds after which it ends early and reports on what there is.
        quality, all_pairs: see :func:`compressm.experiments.comparing.results.gather`.

    Returns:
        what was found; None where it was stopped, or no run is done that can be reported on.

    Raises:
        CompressmError: see the messages.
    """
    design.write(out)
    with ComparisonDisplay(console, design, out) as display:
        complete = execute(design, out, display, stopped, workers=workers, budget=budget)
        if stopped():
            return None
        if complete:
            display.message("timing a training step of the final models in turn")
            time_steps(design, out)
        else:
            display.message("the time is up; what is done is reported, and the same command goes on")
    found = gather(design, out, quality=quality, all_pairs=all_pairs)
    if found is not None:
        write_text(out / RESULT_FILE, json.dumps(found.to_dict(), indent=1, allow_nan=False))
        write_comparison(found, out / PAGE_FILE)
    return found


__all__ = ["PAGE_FILE", "RESULT_FILE", "run", "tables"]
