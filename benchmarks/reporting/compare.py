"""What changed between two result files, for reviewers.

    python -m benchmarks.reporting.compare old.json new.json --fail-over 1.10
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from compressm.benchmarking.results import Result, Run
from compressm.errors import ArgumentError, CompressmError

from .analysis import Spread, is_ours
from .wording import commit, machine_name, number, once, span

SAME_MACHINE = ("cpu", "device", "cores", "threads")  # entries of machine that two runs must share
NOISE = 0.03  # by which ceilings of an unchanged machine differ
WIDTH = 150  # columns where the output is no terminal

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# Kind of a change, and what it means; those with a colour are listed, the others counted.
KINDS = {
    "slower": ("slower beyond the spread", "bold red"),
    "faster": ("faster beyond the spread", "green"),
    "unclear": ("changed only if adjusted", "yellow"),
    "explained": ("changed only as the machine did", None),
    "same": ("within the spread", None),
}


@dataclass(frozen=True)
class Change:
    """One contender of one group in both files.

    Attributes:
        old, new: its results.
        measured: new time over old time.
        adjusted: the same as if both machines multiplied matrices equally fast.
    """

    old: Result
    new: Result
    measured: Spread
    adjusted: Spread

    @property
    def kind(self) -> str:
        """A key of KINDS. Slower and faster are those that hold both as measured and adjusted."""
        measured, adjusted = self.measured.verdict, self.adjusted.verdict
        if measured and measured == adjusted:
            return "slower" if measured > 0 else "faster"
        if measured:
            return "explained"
        return "unclear" if adjusted else "same"

    @property
    def factor(self) -> float:
        """The smaller of both quotients: what a slower machine does not explain."""
        return min(self.measured.value, self.adjusted.value)


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Attributes:
        old, new: the runs.
        changes: contenders that both have, the most slowed first.
        redefined: (group, contender) that both have with another shape, dtype, pass or level.
        lost: (group, contender, why): timed before, without a time now.
        gained: (group, contender): timed only now.
    """

    old: Run
    new: Run
    changes: tuple[Change, ...]
    redefined: tuple[tuple[str, str], ...]
    lost: tuple[tuple[str, str, str], ...]
    gained: tuple[tuple[str, str], ...]

    @property
    def speed(self) -> float:
        """Matrix products of the new machine over those of the old: below 1 it is slower."""
        return self.new.ceilings.matmul_gflop_per_s / self.old.ceilings.matmul_gflop_per_s

    @property
    def control(self) -> float | None:
        """Median adjusted change of the peers, whose code is not in this repository; None without peers."""
        values = [change.adjusted.value for change in self.changes if not is_ours(change.new.contender)]
        return statistics.median(values) if values else None

    def over(self, factor: float) -> list[str]:
        """What of ours got slower by more than a factor, or failed where it had a time."""
        found = [
            f"{c.new.group}, {c.new.contender}: {number(c.factor)}x"
            for c in self.changes
            if is_ours(c.new.contender) and c.kind == "slower" and c.factor > factor
        ]
        failed = {(entry.group, entry.contender) for entry in self.new.failed}
        broken = [f"{g}, {name}: {why}" for g, name, why in self.lost if is_ours(name) and (g, name) in failed]
        return found + broken


def compare(old: Run, new: Run, *, force: bool = False) -> Comparison:
    """Match results by group and contender.

    Raises:
        ArgumentError: the runs are from different machines, and not ``force``.
    """
    differ = [key for key in SAME_MACHINE if old.machine.get(key) != new.machine.get(key)]
    if differ and not force:
        words = "; ".join(f"{key} {old.machine.get(key)} and {new.machine.get(key)}" for key in differ)
        raise ArgumentError(
            f"old, new: expected runs of the same machine, got {words}. Measure both on one machine, or pass --force"
            " (force=True) to compare them all the same"
        )
    before, after = ({(r.group, r.contender): r for r in run.results} for run in (old, new))
    speed = new.ceilings.matmul_gflop_per_s / old.ceilings.matmul_gflop_per_s
    reasons = {(e.group, e.contender): f"{kind}: {e.reason}" for kind in ("skipped", "failed") for e in getattr(new, kind)}
    changes, redefined = [], []
    for key in (key for key in after if key in before):
        if _definition(before[key]) != _definition(after[key]):
            redefined.append(key)
            continue
        measured = Spread.of(after[key], before[key])
        changes.append(Change(before[key], after[key], measured, Spread(*(speed * value for value in measured))))
    return Comparison(
        old, new, tuple(sorted(changes, key=lambda c: -c.factor)), tuple(redefined),
        tuple((*key, reasons.get(key, "not in the new file")) for key in before if key not in after),
        tuple(key for key in after if key not in before),
    )  # fmt: skip


def _definition(result: Result) -> tuple:
    return result.op, result.level, result.passes, result.dtype, tuple(sorted(result.shape.items()))


def show(comparison: Comparison, console: Console) -> None:
    """Print what changed; what did not is counted."""
    _show_machines(comparison, console)
    ours = [c for c in comparison.changes if is_ours(c.new.contender)]
    peers = [c for c in comparison.changes if not is_ours(c.new.contender)]
    for name, changes in (("compressm", ours), ("peers", peers)):
        _show_changes(name, changes, console)
    if comparison.control is not None:
        words = f"Control: peers take {number(comparison.control)}x the time of before, adjusted (median of {len(peers)})."
        console.print(words, highlight=False)
    for title, entries in (
        ("Without a time now", [f"{g}, {name} ({why})" for g, name, why in comparison.lost]),
        ("New", [f"{g}, {name}" for g, name in comparison.gained]),
        ("Redefined, not compared", [f"{g}, {name}" for g, name in comparison.redefined]),
    ):
        if entries:
            console.print(f"\n{title} ({len(entries)}):", highlight=False)
            for entry in entries:
                console.print(Text(f"  {entry}"))


def _show_machines(comparison: Comparison, console: Console) -> None:
    old, new = comparison.old, comparison.new
    names = list(dict.fromkeys((machine_name(old.machine), machine_name(new.machine))))
    console.print(Text(" and ".join(names)))
    table = Table("", "old", "new", "new / old", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, words in (("copy_gb_per_s", "copy, GB/s"), ("matmul_gflop_per_s", "matrix products, GFLOP/s"),
                        ("exp_g_per_s", "exponentials, G/s")):  # fmt: skip
        a, b = getattr(old.ceilings, name), getattr(new.ceilings, name)
        table.add_row(words, number(a), number(b), number(b / a))
    table.add_row("commit", Text(commit(old.machine)), Text(commit(new.machine)), "")
    for name, before, after in _versions(comparison):
        table.add_row(Text(name), Text(before), Text(after), "")
    console.print(table)
    change = comparison.speed - 1
    if abs(change) <= NOISE:
        console.print("The machine was as fast as before, by its matrix products.\n", highlight=False)
    else:
        side = "slower" if change < 0 else "faster"
        words = f"[bold]The machine was {abs(change):.0%} {side} in the new run[/], by its matrix products."
        console.print(f"{words} Adjusted: as if it had not been.\n", highlight=False)


def _versions(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Software of another version."""
    found = []
    for run in (comparison.old, comparison.new):
        about = {name: run.machine.get(name) for name in ("python", "torch", "triton", "compressm")}
        found.append({**about, **dict(run.machine["versions"])})
    old, new = found
    return [
        (name, str(old.get(name) or "none"), str(new.get(name) or "none"))
        for name in dict.fromkeys((*old, *new))
        if old.get(name) != new.get(name)
    ]


def _show_changes(name: str, changes: list[Change], console: Console) -> None:
    by_kind = {kind: [c for c in changes if c.kind == kind] for kind in KINDS}
    counts = ", ".join(f"{len(by_kind[kind])} {words}" for kind, (words, _) in KINDS.items() if by_kind[kind])
    console.print(f"[bold]{name}[/], {len(changes)} compared: {counts or 'nothing'}.", highlight=False)
    headings = ("", "computation", "contender", "old ms", "new ms", "new / old", "spread", "adjusted")
    table = Table(*headings, box=None, pad_edge=False)
    for column in table.columns[3:]:
        column.justify = "right"
    for kind, (_, style) in KINDS.items():
        for c in by_kind[kind] if style else ():
            times = (number(r.milliseconds.median) for r in (c.old, c.new))
            spread = "once" if once(c.old, c.new) else span(c.measured.low, c.measured.high)
            ratio = number(c.measured.value), spread, number(c.adjusted.value)
            table.add_row(Text(kind, style), Text(c.new.group), Text(c.new.contender), *times, *ratio)
    if table.rows:
        console.print(table)
    console.print()


@app.command()
def main(
    old: Annotated[Path, typer.Argument(help="Result file of before.", show_default=False)],
    new: Annotated[Path, typer.Argument(help="Result file of now.", show_default=False)],
    fail_over: Annotated[
        float | None,
        typer.Option(help="Exit with 1 if compressm got slower by more than this anywhere, e.g. 1.10, or fails now."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Compare different machines all the same.")] = False,
) -> None:
    """Print what got slower or faster between two result files."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    try:
        if fail_over is not None and not fail_over >= 1:
            raise ArgumentError(f"--fail-over: expected a factor of 1 or more, got {fail_over}. 1.10 allows 10 %")
        comparison = compare(Run.load(old), Run.load(new), force=force)
    except CompressmError as error:
        typer.echo(f"compressm: {error}", err=True)
        raise typer.Exit(2) from None
    show(comparison, console)
    if fail_over is not None and (found := comparison.over(fail_over)):
        console.print(Text(f"\nSlower by more than {number(fail_over)}x, or failed:", "bold red"))
        for line in found:
            console.print(Text(f"  {line}"))
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
