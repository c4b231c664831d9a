"""report.json as typed records, and the numbers that table, summary and pictures share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compressm.errors import DataError

FORMAT = 1
REFERENCE = "full"  # the run that speed and accuracy are compared with


class _Record(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class CurvePoint(_Record):
    """One point of a training curve; accuracy is the running one on training batches."""

    step: int
    loss: float | None = None
    accuracy: float | None = None
    seconds_per_step: float | None = None
    states: list[int] = Field(default_factory=list)


class Evaluation(_Record):
    """Accuracy and loss on the test set after a step."""

    step: int
    accuracy: float | None = None
    loss: float | None = None


class LayerCut(_Record):
    """One layer of a reduction; the fields of :class:`compressm.compression.report.LayerReduction`."""

    name: str
    rank_before: int
    rank_after: int
    spectrum: list[float] = Field(default_factory=list)
    spectrum_after: list[float] = Field(default_factory=list)
    convention: Literal["real", "complex"] = "real"
    gramians: str = "data-free"
    discarded: float = 0.0
    error_bound: float | None = None
    method: str = ""
    kernel_plan_before: str = ""
    kernel_plan_after: str = ""

    @property
    def changed(self) -> bool:
        return self.rank_after < self.rank_before

    @property
    def spectrum_name(self) -> str:
        """Which spectrum tau and ``discarded`` refer to."""
        size = "real spectrum, 2N values" if self.convention == "real" else "complex spectrum, N values"
        return f"{size}, {self.gramians} Gramians"

    @property
    def kept_values(self) -> int:
        """Number of singular values before the cut: the rest sums to the fraction ``discarded`` of all."""
        total = math.fsum(self.spectrum)
        if not self.changed or total <= 0:
            return len(self.spectrum)
        best, gap, tail = len(self.spectrum), abs(self.discarded), 0.0
        for index in range(len(self.spectrum) - 1, 0, -1):
            tail += self.spectrum[index] / total
            if abs(tail - self.discarded) < gap:
                best, gap = index, abs(tail - self.discarded)
        return best


class Reduction(_Record):
    """One attempt at reducing the model."""

    step: int
    seconds: float = 0.0
    reason: str = ""
    layers: list[LayerCut] = Field(default_factory=list)
    accuracy_before: float | None = None
    accuracy_after: float | None = None

    @property
    def changed(self) -> bool:
        return any(layer.changed for layer in self.layers)


class Final(_Record):
    """Where a run ended; accuracy and loss on the test set."""

    accuracy: float | None = None
    loss: float | None = None
    states: dict[str, int] = Field(default_factory=dict)
    seconds_total: float | None = None
    seconds_training: float | None = None
    seconds_per_step: float | None = None


class Run(_Record):
    """One training run."""

    name: str
    title: str = ""
    steps: int = 0
    seed: int | None = None
    parameters: int | None = None
    curve: list[CurvePoint] = Field(default_factory=list)
    evaluations: list[Evaluation] = Field(default_factory=list)
    reductions: list[Reduction] = Field(default_factory=list)
    final: Final = Field(default_factory=Final)

    @property
    def label(self) -> str:
        return self.title or self.name.replace("_", " ")


class StepTime(_Record):
    """Seconds per training step of one final model, measured in turn with the others."""

    name: str
    median: float
    p20: float | None = None
    p80: float | None = None


class Timing(_Record):
    """The interleaved measurement."""

    repeats: int | None = None
    steps: list[StepTime] = Field(default_factory=list)


class Report(_Record):
    """What a training command wrote."""

    format: int = FORMAT
    preset: str = ""
    title: str = ""
    config: dict[str, Any] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)
    dataset: dict[str, Any] = Field(default_factory=dict)
    runs: list[Run] = Field(min_length=1)
    timing: Timing | None = None

    def run(self, name: str) -> Run | None:
        """The run of that name, or None."""
        return next((run for run in self.runs if run.name == name), None)

    def step_time(self, run: Run) -> StepTime | None:
        """The interleaved step time of a run's final model, or None where it was not measured."""
        steps = self.timing.steps if self.timing else []
        return next((step for step in steps if step.name == run.name), None)


@dataclass(frozen=True)
class Row:
    """One line of the comparison table; None where the report does not say.

    Attributes:
        name, title: of the run.
        accuracy: on the test set, in [0, 1].
        accuracy_gap: accuracy minus that of the full-size run.
        states: per layer.
        parameters: of the final model.
        step_seconds: median seconds per training step of the final model; ``interleaved`` tells how it was measured.
        speed: step time of the full-size run over this one's.
        seconds_training: all steps and reductions, without evaluations.
        seconds_total: everything.
    """

    name: str
    title: str
    accuracy: float | None
    accuracy_gap: float | None
    states: tuple[int, ...]
    parameters: int | None
    step_seconds: float | None
    interleaved: bool
    speed: float | None
    seconds_training: float | None
    seconds_total: float | None


def parse_report(data: Mapping[str, Any]) -> Report:
    """Check a report's fields and types.

    Raises:
        DataError: it is not such a report; names the first thing that is wrong.
    """
    if not isinstance(data, Mapping):
        raise DataError(f"report: expected a JSON object, got {type(data).__name__}. Run compressm train to write a new one")
    if data.get("format", FORMAT) != FORMAT:
        raise DataError(f"report: expected format {FORMAT}, got {data['format']!r}. Use the version of compressm that wrote it")
    try:
        return Report.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the top level"
        raise DataError(
            f"report: {place}: {first['msg'][0].lower()}{first['msg'][1:]} ({error.error_count()} such errors). "
            "Run compressm train to write a new one"
        ) from error


def read_report(path: str | Path) -> dict[str, Any]:
    """Read and check ``report.json`` (or the folder that holds it) and return it as a dict.

    Raises:
        DataError: missing, unreadable, not JSON or not such a report.
    """
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path}: {reason}; expected the report.json that compressm train writes into its --out folder") from error
    except ValueError as error:
        raise DataError(f"{path}: expected JSON, got text that does not parse ({error}). Write it anew with compressm train") from error
    try:
        parse_report(data)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return data


def rows(report: Report) -> list[Row]:
    """The comparison table, in the report's order of runs."""
    reference = report.run(REFERENCE)
    interleaved = all(report.step_time(run) is not None for run in report.runs)
    reference_seconds = _step_seconds(report, reference, interleaved)
    return [_row(report, run, reference, reference_seconds, interleaved) for run in report.runs]


def _row(report: Report, run: Run, reference: Run | None, reference_seconds: float | None, interleaved: bool) -> Row:
    final, seconds = run.final, _step_seconds(report, run, interleaved)
    gap = None
    if reference is not None and run is not reference and None not in (final.accuracy, reference.final.accuracy):
        gap = final.accuracy - reference.final.accuracy
    return Row(
        name=run.name,
        title=run.label,
        accuracy=final.accuracy,
        accuracy_gap=gap,
        states=tuple(final.states.values()),
        parameters=run.parameters,
        step_seconds=seconds,
        interleaved=interleaved,
        speed=reference_seconds / seconds if reference_seconds and seconds else None,
        seconds_training=final.seconds_training,
        seconds_total=final.seconds_total,
    )


def _step_seconds(report: Report, run: Run | None, interleaved: bool) -> float | None:
    if run is None:
        return None
    return report.step_time(run).median if interleaved else run.final.seconds_per_step
