"""Runs with known figures, and tables read back from Markdown."""

from __future__ import annotations

import re

from compressm.benchmarking.results import Ceilings, Counts, Milliseconds, Missing, Result, Run

CEILINGS = Ceilings(copy_gb_per_s=20.0, matmul_gflop_per_s=300.0, exp_g_per_s=10.0)
MACHINE = {
    "cpu": "Test CPU", "cores": 2, "threads": 2, "device": "cpu", "python": "3.11.7", "torch": "2.13.0", "compressm": "0.1.0",
    "commit": "0123456789abcdef0123456789abcdef01234567", "date": "2026-11-25T00:00:00+00:00", "versions": {"jax": "0.10.2"},
}  # fmt: skip
LETTERS = {"batch": "B", "channels": "D", "length": "L", "states": "N"}


def timed(op="selective_scan", contender="compressm", median=2.0, *, spread=0.05, level="op", passes="forward", dtype="float32",
          group=None, limit=None, by="bytes", peak=1 << 20, rounds=9, error=2e-7, **shape) -> Result:  # fmt: skip
    """A result whose percentiles lie ``spread`` to both sides of the median."""
    shape = shape or {"batch": 2, "length": 64, "states": 16}
    name = " ".join([op, *(f"{LETTERS.get(key, key)}{n}" for key, n in shape.items()), passes])
    low, high = median * (1 - spread), median * (1 + spread)
    return Result(
        group=group or name, op=op, level=level, shape=shape, dtype=dtype, passes=passes, contender=contender, peak_bytes=peak,
        error=error, milliseconds=Milliseconds(median=median, low=low, high=high, minimum=low, rounds=rounds),
        counts=Counts(bytes=1, flops=1, exponentials=0), limit_ms=limit, limit_by=by if limit else None,
    )  # fmt: skip


def step(op, states, median, contender="compressm", **more) -> Result:
    return timed(op, contender, median, level="step", passes="step", batch=50, states=states, **more)


def run_of(*results, ceilings=CEILINGS, skipped=(), failed=(), **machine) -> Run:
    return Run(machine={**MACHINE, **machine}, ceilings=ceilings, results=results, skipped=skipped, failed=failed)


def missing(contender, reason, group="selective_scan B2 L64 N16 forward") -> Missing:
    return Missing(group=group, contender=contender, reason=reason)


def tables(lines) -> list[list[list[str]]]:
    """Cells of every Markdown table, headings first; each row must have as many cells as the headings."""
    found, current = [], []
    for line in [*"\n".join(lines).split("\n"), ""]:
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            assert not current or len(cells) == len(current[0]), line
            current.append(cells)
        elif current:
            assert set("".join(current[1])) <= set("-: "), current[1]
            found.append([current[0], *current[2:]])
            current = []
    return found


def table_with(lines, *headings) -> list[dict[str, str]]:
    """Rows by heading of the first table that has all the headings, its spaces plain."""
    for rows in tables(lines):
        if set(headings) <= set(rows[0]):
            return [dict(zip(rows[0], (cell.replace("\u00a0", " ") for cell in row), strict=True)) for row in rows[1:]]
    raise AssertionError(f"no table with {headings}")
