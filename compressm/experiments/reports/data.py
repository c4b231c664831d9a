"""report.json as typed records."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from compressm.errors import DataError
from compressm.experiments.methods import METHODS
from compressm.experiments.tasks.metrics import ACCURACY, METRICS, Metric
from compressm.inputs import report_file

FORMAT = 1


def clean(text: str) -> str:
    """The text on one line, without control characters and other code points that cannot be shown."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


Number = Annotated[float | None, AfterValidator(_finite)]
"""A measurement; NaN, infinity and null all become None: there is no such number."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class CurvePoint(_Record):
    """One point of a training curve: means over the training steps since the previous point.

    The metric on training batches is there too, under its key.  ``states`` are those of these steps: where a reduction
    follows the point, they are the ones before it.
    """

    step: int
    loss: Number = None
    seconds_per_step: Number = None
    states: list[int] = Field(default_factory=list)


class Quality(_Record):
    """What an evaluation found: the report's metric, under its key, and the loss in nats per example or byte."""

    loss: Number = None
    perplexity: Number = None


class Evaluation(Quality):
    """After a step, on the split that the metric watches."""

    step: int


class LayerCut(_Record):
    """One layer of a reduction; the fields of :class:`compressm.compression.planning.report.LayerReduction`."""

    name: str
    rank_before: int
    rank_after: int
    spectrum: list[float] = Field(default_factory=list)
    spectrum_after: list[float] = Field(default_factory=list)
    convention: str = "real"
    gramians: str = "data-free"
    discarded: Number = 0.0
    error_bound: Number = None
    method: str = ""
    kernel_plan_before: str = ""
    kernel_plan_after: str = ""

    @property
    def changed(self) -> bool:
        return self.rank_after < self.rank_before

    @property
    def spectrum_name(self) -> str:
        """Which spectrum tau and ``discarded`` refer to."""
        size = "2N" if self.convention == "real" else "N"
        return f"{self.convention} spectrum ({size} values per layer), {self.gramians} Gramians"

    @property
    def kept_values(self) -> int:
        """Number of values of ``spectrum`` before the cut.

        Other spectra than the real one have one value per state.  With data Gramians ``spectrum_after`` is the kept part.
        Data-free and real, the cut keeps at most two values per state, fewer where real modes take a state each: there, the
        values behind the cut sum to the fraction ``discarded`` of all, and the largest such number is the answer.
        """
        count = len(self.spectrum)
        if not self.changed:
            return count
        if self.convention != "real":
            return min(count, self.rank_after)
        if self.gramians != "data-free" and self.spectrum_after:
            return min(count, len(self.spectrum_after))
        most, total = min(count, 2 * self.rank_after), sum(self.spectrum)
        if self.discarded is None or not 0 < total < math.inf:
            return most
        tail = sum(self.spectrum[most:]) / total
        best, gap = most, abs(tail - self.discarded)
        for index in range(most - 1, 0, -1):
            tail += self.spectrum[index] / total
            if abs(tail - self.discarded) < gap:
                best, gap = index, abs(tail - self.discarded)
        return best


class Reduction(_Record):
    """One attempt at reducing the model; the metric before and after it is there too, under its key."""

    step: int
    seconds: Number = None
    reason: str = ""
    layers: list[LayerCut] = Field(default_factory=list)

    @property
    def changed(self) -> bool:
        return any(layer.changed for layer in self.layers)


class Final(Quality):
    """Where a run ended, on the test set; ``window_bits`` are the bits per byte of its windows, the same for all runs."""

    window_bits: list[float] = Field(default_factory=list)
    states: dict[str, int] = Field(default_factory=dict)
    seconds_total: Number = None
    seconds_training: Number = None
    seconds_per_step: Number = None


class LayerSettling(_Record):
    """One layer at all measuring steps; the fields of :class:`compressm.compression.LayerStability`."""

    steps: list[int] = Field(min_length=1)
    spectra: list[list[Number]]
    drift: list[Number]
    bound: list[Number]
    correlation: list[Number]
    overlap: list[Number]

    @model_validator(mode="after")
    def _complete(self) -> LayerSettling:
        lists = (self.spectra, self.drift, self.bound, self.correlation, self.overlap)
        if any(len(values) != len(self.steps) for values in lists):
            raise ValueError(f"expected {len(self.steps)} entries in every list, one for each step")
        return self


class Run(_Record):
    """One training run; ``stability`` is by layer, empty where it was not measured more than once."""

    name: str
    title: str = ""
    steps: int = 0
    seed: int | None = None
    parameters: int | None = None
    curve: list[CurvePoint] = Field(default_factory=list)
    evaluations: list[Evaluation] = Field(default_factory=list)
    reductions: list[Reduction] = Field(default_factory=list)
    stability: dict[str, LayerSettling] = Field(default_factory=dict)
    final: Final = Field(default_factory=Final)

    @property
    def label(self) -> str:
        """For people: one line, a capital first."""
        label = clean(self.title) or clean(self.name.replace("_", " ")) or "run"
        return label[0].upper() + label[1:]

    @property
    def initial_states(self) -> tuple[int, ...]:
        """Per layer, where the run began; empty where the report does not say."""
        if self.reductions and self.reductions[0].layers:
            return tuple(layer.rank_before for layer in self.reductions[0].layers)
        return tuple(self.curve[0].states if self.curve and self.curve[0].states else self.final.states.values())

    @property
    def final_states(self) -> tuple[int, ...]:
        """Per layer, where the run ended; empty where the report does not say."""
        if self.final.states:
            return tuple(self.final.states.values())
        if self.reductions and self.reductions[-1].layers:
            return tuple(layer.rank_after for layer in self.reductions[-1].layers)
        return tuple(self.curve[-1].states if self.curve else ())

    @property
    def diverged(self) -> bool:
        """Whether the loss was a number once and is none at the end."""
        losses = [point.loss for point in self.curve]
        return bool(losses) and losses[-1] is None and any(loss is not None for loss in losses)

    @property
    def slowest_step(self) -> float:
        """Largest usual seconds per step: 95 % quantile at every size of the model, which leaves out start-up and hiccups."""
        sizes: dict[tuple[int, ...], list[float]] = {}
        for point in self.curve:
            if point.seconds_per_step is not None:
                sizes.setdefault(tuple(point.states), []).append(point.seconds_per_step)
        return max((sorted(seconds)[int(0.95 * (len(seconds) - 1))] for seconds in sizes.values()), default=0.0)

    def elapsed(self, step: int) -> float | None:
        """Seconds of training until after a step, its reduction included; None where the curve does not say."""
        seconds, reached = 0.0, 0
        for point in self.curve:
            if point.seconds_per_step is None:
                return None
            seconds += point.seconds_per_step * (min(point.step, step) - reached)
            reached = min(point.step, step)
            if reached == step:
                return seconds + sum(cut.seconds or 0.0 for cut in self.reductions if cut.step <= step)
        return None


class StepTime(_Record):
    """Seconds per training step of one final model, measured in turn with the others."""

    name: str
    median: Number = None
    p20: Number = None
    p80: Number = None


class Timing(_Record):
    """The interleaved measurement."""

    repeats: int | None = None
    steps: list[StepTime] = Field(default_factory=list)


class Report(_Record):
    """What a training command wrote."""

    format: int = FORMAT
    preset: str = ""
    title: str = ""
    metric: str = ACCURACY.key
    notes: list[str] = Field(default_factory=list)
    config: dict[str, Any] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)
    dataset: dict[str, Any] = Field(default_factory=dict)
    runs: list[Run] = Field(min_length=1)
    timing: Timing | None = None

    @model_validator(mode="after")
    def _distinct(self) -> Report:
        if len({run.name for run in self.runs}) != len(self.runs):
            raise ValueError("the names of runs must differ")
        if self.metric not in METRICS:
            raise ValueError(f"metric {self.metric!r} is unknown, expected one of {', '.join(METRICS)}")
        for run in self.runs:
            for record in (*run.evaluations, *run.reductions, run.final):
                for key in (self.metric, *self._sides):
                    if not isinstance(value := (record.model_extra or {}).get(key), int | float | None):
                        raise ValueError(f"run {run.name!r}: {key} is {value!r}, expected a number")
        return self

    @property
    def _sides(self) -> tuple[str, str]:
        """Where a reduction holds the metric before and after it."""
        return f"{self.metric}_before", f"{self.metric}_after"

    @property
    def measure(self) -> Metric:
        """The metric that the runs are judged by."""
        return METRICS[self.metric]

    def score(self, quality: Quality) -> float | None:
        """The metric's value in an evaluation or a result."""
        return _finite((quality.model_extra or {}).get(self.metric))

    def around(self, cut: Reduction) -> tuple[float | None, float | None]:
        """The metric just before and just after a reduction, on the split that it watches."""
        before, after = (_finite((cut.model_extra or {}).get(side)) for side in self._sides)
        return before, after

    def run(self, name: str) -> Run | None:
        """The run of that name, or None."""
        return next((run for run in self.runs if run.name == name), None)

    @property
    def reference(self) -> Run | None:
        """The run that speed and quality are compared with."""
        return next((run for run in self.runs if run.name in METHODS and METHODS[run.name].reference), None)

    @property
    def main(self) -> Run:
        """The run that the report is about: the first that shrinks in training, else the first."""
        return next((run for run in self.runs if run.name in METHODS and METHODS[run.name].shrinks), self.runs[0])

    def step_time(self, run: Run) -> StepTime | None:
        """The interleaved step time of a run's final model, or None where it was not measured."""
        steps = self.timing.steps if self.timing else []
        return next((step for step in steps if step.name == run.name and step.median), None)


def parse_report(data: Mapping[str, Any] | Report) -> Report:
    """Check a report's fields and types; a parsed report is returned as it is.

    Raises:
        DataError: it is not such a report; names the first thing that is wrong.
    """
    if isinstance(data, Report):
        return data
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
    path = report_file(Path(path))
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        remedy = "Write it anew with compressm train"
        raise DataError(f"{path}: expected JSON, got text that does not parse ({error}). {remedy}") from error
    try:
        parse_report(data)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return data
