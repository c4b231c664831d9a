"""What a run of a comparison leaves behind: one JSON file, whole or not there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compressm.compression.common.models import compressible_layers
from compressm.errors import DataError
from compressm.experiments.comparing.design import Job
from compressm.experiments.provenance import commit, versions
from compressm.experiments.reports.data import Run
from compressm.experiments.runs import machine, write_text
from compressm.experiments.tasks.metrics import METRICS, Metric
from compressm.experiments.training import TrainingRun

FORMAT = 1
PACKAGES = ("numpy", "scipy", "torch", "triton")


class Entry(BaseModel):
    """The record of one run.

    Attributes:
        format: of the file.
        preset, title: of the task.
        notes: for the reader.
        metric: by whose value it is judged.
        method, seed, lr_multiple: which run it is.
        tuning: whether it only helped to choose a learning rate.
        diverged: why there is no result; empty where there is one.
        settings, dataset: of the run.
        machine, commit, versions: where and with what it was made.
        state_bytes: of the final model, for a sequence.
        seconds_teachers: of training that its teachers took.
        run: as in the report of a training command.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    format: int = FORMAT
    preset: str
    title: str = ""
    notes: list[str] = Field(default_factory=list)
    metric: str
    method: str
    seed: int
    lr_multiple: float
    tuning: bool
    diverged: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    dataset: dict[str, Any] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)
    commit: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    state_bytes: int | None = None
    seconds_teachers: float = 0.0
    run: Run

    @model_validator(mode="after")
    def _known(self) -> Entry:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format}, expected {FORMAT}")
        if self.metric not in METRICS:
            raise ValueError(f"metric {self.metric!r}, expected one of {', '.join(METRICS)}")
        return self

    @property
    def measure(self) -> Metric:
        """The metric."""
        return METRICS[self.metric]

    @property
    def score(self) -> float | None:
        """The metric on the test set at the end; None where the run diverged."""
        return None if self.diverged else self.value(self.run.final)

    def value(self, quality: Any) -> float | None:
        """The metric's value in an evaluation or a result."""
        found = (quality.model_extra or {}).get(self.metric)
        return found if found is not None and math.isfinite(found) else None

    @property
    def seconds_training(self) -> float | None:
        """Of all steps and reductions, those of its teachers included."""
        own = self.run.final.seconds_training
        return None if own is None else own + self.seconds_teachers

    def reached(self, quality: float) -> tuple[int, float | None] | None:
        """The step after which the metric was first found as good as ``quality``, and the seconds of training until then."""
        for evaluation in self.run.evaluations:
            value = self.value(evaluation)
            if value is not None and (value >= quality if self.measure.higher_is_better else value <= quality):
                elapsed = self.run.elapsed(evaluation.step)
                return evaluation.step, None if elapsed is None else elapsed + self.seconds_teachers
        return None


def write_entry(
    path: Path, preset: str, job: Job, run: TrainingRun, *, multiple: float, teachers: float, diverged: str = ""
) -> None:
    """Write the record of a run.

    Args:
        path: of the file.
        preset, job: which run it is.
        run: the run, at its end or where it diverged.
        multiple: of the preset's learning rate.
        teachers: seconds of training of its teachers.
        diverged: why it has no result.

    Raises:
        CheckpointError: it cannot be written.
    """
    task, layers = run.task, compressible_layers(run.model)
    entry = {
        "format": FORMAT,
        "preset": preset,
        "title": task.settings.title,
        "notes": list(task.notes),
        "metric": task.objective.metric.key,
        "method": job.method,
        "seed": job.seed,
        "lr_multiple": multiple,
        "tuning": job.tuning,
        "diverged": diverged,
        "settings": task.settings.to_dict(),
        "dataset": task.describe(),
        "machine": machine(task.device),
        "commit": commit(),
        "versions": versions(PACKAGES),
        "state_bytes": sum(adapter.state_bytes(module, adapter.rank(module)) for module, adapter in layers.values()),
        "seconds_teachers": teachers,
        "run": run.summary(),
    }
    write_text(path, json.dumps(_finite(entry), indent=1, allow_nan=False))


def read_entry(path: Path) -> Entry:
    """Read the record of a run.

    Raises:
        DataError: it is missing, or no such record.
    """
    try:
        return Entry.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: {reason}; expected what compressm compare wrote. Delete it to have it run again") from error


def _finite(tree: Any) -> Any:
    """A JSON tree with null for what is no number: measured while a run diverged."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
