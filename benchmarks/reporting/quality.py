"""The tables of quality, made of what ``compressm compare`` left in ``benchmarks/quality/`` and put between marks in pages.

    python -m benchmarks.reporting.quality

Nothing else of a page is touched.  A folder holds ``design.json`` and ``compare.json``, as the command wrote them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from compressm.errors import CompressmError, DataError
from compressm.experiments.methods import METHODS
from compressm.experiments.tasks.metrics import METRICS, MISSING, Metric
from compressm.experiments.tasks.presets import PRESETS

from .wording import NONE, code, escape, number, table

ROOT = Path(__file__).parents[2]
FOLDER = Path("benchmarks/quality")
FILES = {"design.json": {"preset", "overrides", "multiples"}, "compare.json": {"arms", "pairs", "metric"}}  # and their keys
OURS, LARGE = "compressed", "full"  # the arm that is compared with the others, and the one of full size

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Compared:
    """One folder.

    Attributes:
        name: of the folder.
        design, found: the contents of its files.
    """

    name: str
    design: dict[str, Any]
    found: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Compared:
        """What is in a folder.

        Raises:
            DataError: a file is missing or is something else.
        """
        parts = {}
        for file, keys in FILES.items():
            try:
                parts[file] = json.loads((folder / file).read_text(encoding="utf-8"))
                if missing := keys - parts[file].keys():
                    raise ValueError(f"no {', '.join(sorted(missing))}")
            except (OSError, ValueError, AttributeError) as error:
                raise DataError(f"{folder / file}: {error}, expected what compressm compare wrote") from error
        return cls(folder.name, parts["design.json"], parts["compare.json"])

    @property
    def metric(self) -> Metric:
        """That all are judged by."""
        return METRICS[self.found["metric"]]

    @property
    def arms(self) -> list[dict[str, Any]]:
        """The methods, in the order of the command."""
        return self.found["arms"]

    @property
    def title(self) -> str:
        """Of the task, with what differs from the preset."""
        words = escape(PRESETS[self.design["preset"]]["title"])
        changed = ", ".join(code(f"{key}={value}") for key, value in self.design["overrides"].items())
        return f"{words}, {changed}" if changed else words

    @property
    def tuned(self) -> bool:
        """Whether every method trained with the best of some learning rates."""
        return bool(self.design["multiples"])

    @property
    def seeds(self) -> int:
        """Of the method with most runs."""
        return max(len(arm["seeds"]) for arm in self.arms)

    @property
    def command(self) -> str:
        """That made it."""
        words = ["compressm compare", self.design["preset"], "--methods", ",".join(arm["name"] for arm in self.arms)]
        words += ["--seeds", str(self.seeds)]
        if self.tuned:
            words += ["--tune", f"lr={','.join(f'{multiple:g}' for multiple in self.design['multiples'])}"]
            words += ["--tune-seeds", str(self.design["tuning_seeds"])]
        values = {k: v if isinstance(v, str) else json.dumps(v) for k, v in self.design["overrides"].items()}
        return " ".join([*words, *(f"--set {key}={value}" for key, value in values.items())])

    def arm(self, name: str) -> dict[str, Any] | None:
        """Of a method; None where it was not run."""
        return next((arm for arm in self.arms if arm["name"] == name), None)

    def rival(self) -> dict[str, Any] | None:
        """The best by its mean of the methods that end smaller and are not ours in another way; None where there is none."""
        small = {name for name, method in METHODS.items() if method.reduced and not name.startswith(OURS)}
        others = [arm for arm in self.arms if arm["name"] in small and arm["score"]]
        sign = 1 if self.metric.higher_is_better else -1
        return max(others, key=lambda arm: sign * arm["score"]["mean"], default=None)

    def score(self, arm: dict[str, Any] | None) -> str:
        """``95.53 ± 0.70``: mean and standard error."""
        if arm is None or arm["score"] is None:
            return NONE
        mean, error = arm["score"]["mean"], arm["score"]["error"]
        spread = "" if error is None else f" ± {self.metric.factor * error:.{self.metric.digits}f}"
        return f"{self.metric.number(mean)}{spread}"

    def verdict(self, name: str) -> str:
        """How ours differs from a method: ``+25.40 (+8.62 to +42.18), better``."""
        pair = next((p for p in self.found["pairs"] if (p["ours"], p["theirs"]) == (OURS, name)), None)
        if pair is None:
            return NONE
        gap = pair["difference"]
        between = "" if gap["low"] is None else f" ({self.metric.signed(gap['low'])} to {self.metric.signed(gap['high'])})"
        return f"{self.metric.signed(gap['mean'])}{between}, {pair['verdict']}"


def gathered(root: Path) -> list[Compared]:
    """All folders, by name.

    Raises:
        DataError: one cannot be read.
    """
    return [Compared.read(path.parent) for path in sorted((root / FOLDER).glob("*/compare.json"))]


def overview(all_of_them: Sequence[Compared]) -> list[str]:
    """A line for every comparison with a rival, of two seeds and more: one says nothing of others."""
    rows = []
    for compared in all_of_them:
        rival = compared.rival()
        if rival is None or compared.seeds < 2:
            continue
        tuned = "tuned" if compared.tuned else "the preset's"
        best = f"{compared.score(rival)} ({escape(rival['title'])})"
        rows.append([
            compared.title, compared.metric.heading, tuned, str(compared.seeds), compared.score(compared.arm(OURS)),
            compared.score(compared.arm(LARGE)), best, compared.verdict(rival["name"]),
        ])  # fmt: skip
    headings = ("task", "metric", "learning rate", "seeds", "compressed", "full size", "best other small one", "difference")
    words = (
        "Mean and standard error; the difference is paired by seed, with its 95 % interval, and its verdict is corrected for "
        "the number of comparisons in its folder. The best other small one was chosen on these seeds, which favours it."
    )
    return [*table(headings, rows, left=3), words]


def details(all_of_them: Sequence[Compared]) -> list[str]:
    """Every comparison with all its methods."""
    lines = []
    for compared in all_of_them:
        lines += [f"## {code(compared.name)}", "", f"{compared.title}: {code(compared.command)}", ""]
        rows = []
        for arm in compared.arms:
            states = sorted(set(arm["states"]))
            rows.append([
                escape(arm["title"]), f"x{arm['lr_multiple']:g}", str(len(arm["seeds"])), compared.score(arm),
                compared.verdict(arm["name"]), "-".join(map(str, states[:1] + states[-1:] * (len(states) > 1))),
                _plain(arm["state_bytes"]), _plain(arm["parameters"]),
                NONE if arm["seconds_per_step"] is None else number(1e3 * arm["seconds_per_step"]),
                NONE if arm["seconds_training"] is None else number(arm["seconds_training"]),
            ])  # fmt: skip
        metric = compared.metric
        headings = ("method", "lr", "seeds", metric.heading, f"compressed minus it, {metric.gap_unit}", "states", "bytes",
                    "parameters", "ms/step", "training, s")  # fmt: skip
        lines += table(headings, rows)
    return lines[:-1]


def _plain(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}"


TABLES: dict[str, Callable[[Sequence[Compared]], list[str]]] = {"overview": overview, "details": details}
PAGES = {FOLDER / "README.md": "details", Path("README.md"): "overview", Path("docs/choosing.md"): "overview"}


def marked(text: str, name: str, lines: Sequence[str], path: Path) -> str:
    """A page with other lines between the marks of a table.

    Raises:
        DataError: it does not have these marks once.
    """
    begin, end = f"<!-- quality {name}: made by make quality -->", f"<!-- end of quality {name} -->"
    parts = re.split(f"{re.escape(begin)}.*?{re.escape(end)}", text, flags=re.DOTALL)
    if len(parts) != 2:
        raise DataError(f"{path}: expected the lines {begin!r} and {end!r} once, got {len(parts) - 1} such pairs. Put them in")
    return parts[0] + "\n".join([begin, "", *lines, "", end]) + parts[1]


def pages(root: Path) -> dict[Path, str]:
    """The text that every page should have.

    Raises:
        DataError: results cannot be read, or a page has no marks.
    """
    found = gathered(root)
    lines = {name: make(found) for name, make in TABLES.items()}
    return {
        path: marked((root / path).read_text(encoding="utf-8"), name, lines[name], path) for path, name in PAGES.items()
    }


@app.command()
def main(root: Annotated[Path, typer.Argument(help="The repository.")] = ROOT) -> None:
    """Put the tables of all comparisons into the pages."""
    try:
        for path, text in pages(root).items():
            (root / path).write_text(text, encoding="utf-8")
            typer.echo(f"{path}: written")
    except (CompressmError, OSError) as error:
        typer.echo(f"compressm: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
