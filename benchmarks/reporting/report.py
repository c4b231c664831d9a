"""The speed report: one Markdown file and its pictures, the same bytes for the same result files.

    python -m benchmarks.reporting.report benchmarks/results/*.json --modelled benchmarks/modelled.json --out REPORT.md
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from compressm.benchmarking.results import Run
from compressm.errors import ArgumentError, CompressmError, DataError

from . import figures, sections, training_steps
from .analysis import OURS, Shrinking, contenders, shrinking_steps
from .modelled import Modelled, section
from .wording import escape, machine_name, plain_name

DEFAULT_OUT = Path("benchmarks/REPORT.md")
FIGURES = "figures"  # folder beside the report

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Page:
    """A report while it is written.

    Attributes:
        lines: of Markdown.
        pictures: what draws a PNG, by file name.
    """

    lines: list[str] = field(default_factory=list)
    pictures: dict[str, Callable[[], bytes]] = field(default_factory=dict)

    def add(self, lines: Iterable[str]) -> None:
        self.lines.extend(lines)

    def picture(self, name: str, words: str, draw: Callable[..., bytes], *data: object) -> None:
        """A picture with its description."""
        self.pictures[name] = partial(draw, *data)
        self.add([f"![{words}]({FIGURES}/{name})", ""])


def build(runs: dict[str, Run], modelled: Modelled | None = None) -> Page:
    """The report of runs by name, in their order; a name becomes part of its pictures' names.

    Args:
        modelled: figures of kernels that were compiled and not run.

    Raises:
        ArgumentError: no run at all.
    """
    if not runs:
        raise ArgumentError("runs: expected one result file or more, got none. Write one with make bench")
    page, titles, stems = Page(), _titles(runs), _stems(runs)
    page.add(["# Speed report", "", *sections.introduction(runs)])
    _headline(page, runs, titles, stems)
    page.add(sections.in_short(runs, titles))
    for name, run in runs.items():
        _machine(page, run, titles[name], stems[name])
    page.add([] if modelled is None else section(modelled))
    page.add(sections.METHOD)
    return page


def write(paths: Sequence[Path], out: Path, modelled: Path | None = None) -> Page:
    """Read result files and write the report of them; pictures of an earlier report that it no longer shows are removed.

    Raises:
        ArgumentError: no path, or two of the same name.
        DataError: a file is not a result file, or the report cannot be written.
    """
    runs = {path.stem: Run.load(path) for path in paths}
    if len(runs) != len(paths):
        raise ArgumentError(f"paths: expected files of different names, got {', '.join(map(str, paths))}. Rename one")
    page = build(runs, None if modelled is None else Modelled.load(modelled))
    folder = out.parent / FIGURES
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in sorted(_shown(out) - set(page.pictures)):
            (folder / old).unlink(missing_ok=True)
        for name, draw in page.pictures.items():
            (folder / name).write_bytes(draw())
        out.write_text("\n".join(page.lines).rstrip() + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}). Choose another place with --out") from error
    return page


def _shown(report: Path) -> set[str]:
    if not report.exists():
        return set()
    return set(re.findall(rf"\]\({FIGURES}/([a-z0-9_-]+\.png)\)", report.read_text(encoding="utf-8", errors="replace")))


def _titles(runs: dict[str, Run]) -> dict[str, str]:
    """What each run is called: its machine, and what tells it from another run on an equal one."""
    plain = {name: escape(machine_name(run.machine)) for name, run in runs.items()}
    alike = [title for title in plain.values() if list(plain.values()).count(title) > 1]
    return {name: f"{title} ({escape(name)})" if title in alike else title for name, title in plain.items()}


def _stems(runs: dict[str, Run]) -> dict[str, str]:
    stems: dict[str, str] = {}
    for name in runs:
        stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"
        stems[name] = stem if stem not in stems.values() else f"{stem}-{len(stems)}"
    return stems


def _headline(page: Page, runs: dict[str, Run], titles: dict[str, str], stems: dict[str, str]) -> None:
    found: dict[str, list[Shrinking]] = {name: shrinking_steps(run) for name, run in runs.items()}
    page.add(training_steps.headline(found, titles))
    for name, steps in found.items():
        ours = [step for step in steps if step.contender == OURS]
        if ours:
            words = f"Time of a training step over the number of states, {titles[name]}"
            page.picture(f"{stems[name]}-steps.png", words, figures.steps, ours)


def _machine(page: Page, run: Run, title: str, stem: str) -> None:
    styles = figures.looks(contenders(run.results))
    page.add([f"## {title}", "", *sections.machine(run), *sections.slower(run)])
    page.add(sections.limits(run))
    measured = sections.with_limit(run)
    if measured:
        page.picture(f"{stem}-limits.png", "Share of the physical limit reached, by op and pass", figures.limits, measured)
    for level, of in sections.by_level(run).items():
        page.add([f"### {sections.LEVELS[level]}", ""])
        page.add(training_steps.own_speed_ups(run) if level == "step" else [])
        page.add(sections.LEGEND)
        for op, found in of.items():
            page.add(sections.op_heading(found, op))
            if any(group.ratios() for group in found):
                name = f"{stem}-{_file(op)}.png"
                words = f"Time of every peer over compressm's, {plain_name(op)}"
                page.picture(name, words, figures.ratios, found, styles)
                page.add(sections.left_out(found, figures.MAX_ROWS))
            page.add(sections.op_tables(found, run))
    _growth(page, run, stem, styles)
    page.add(sections.without_a_time(run))


def _growth(page: Page, run: Run, stem: str, styles: dict[str, dict[str, object]]) -> None:
    by_op = sections.growth(run)
    if not by_op:
        return
    page.add(sections.GROWTH)
    for op, found in by_op.items():
        page.add([f"#### {plain_name(op)}", ""])
        words = f"Time along each axis on log scales, {plain_name(op)}"
        page.picture(f"{stem}-{_file(op)}-growth.png", words, figures.scaling, figures.widest(found), styles)
        page.add(sections.slopes(found))


def _file(op: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", op.lower()).strip("-") or "op"


@app.command()
def main(
    results: Annotated[list[Path], typer.Argument(help="Result files of make bench, one a machine.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The report; its pictures go into figures/ beside it.")] = DEFAULT_OUT,
    modelled: Annotated[Path | None, typer.Option(help="Figures of kernels that were compiled and not run.")] = None,
) -> None:
    """Write the speed report of result files."""
    try:
        page = write(results, out, modelled)
    except CompressmError as error:
        typer.echo(f"compressm: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{out}: {len(results)} result file{'s' * (len(results) > 1)}, {len(page.pictures)} pictures")


if __name__ == "__main__":
    app()
