"""A comparison in numbers: what every method reached, and how the first differs from the others."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from compressm.errors import DataError
from compressm.experiments.comparing.design import Design, Job
from compressm.experiments.comparing.execution import is_done
from compressm.experiments.comparing.jobs import mean_scores, restored
from compressm.experiments.comparing.records import Entry, read_entry
from compressm.experiments.comparing.statistics import LEVEL, Difference, Estimate, estimate, holm, mean_of_all, paired
from compressm.experiments.methods import METHODS
from compressm.experiments.reports.data import StepTime
from compressm.experiments.runs import machine, time_final_models, write_text
from compressm.experiments.tasks.metrics import Metric
from compressm.experiments.training import pick_device

TIMING_FILE = "timing.json"


@dataclass(frozen=True)
class Arm:
    """A method with its runs.

    Attributes:
        name: of the method.
        entries: the runs that are reported on, by seed, at least one.
        tuned: the mean score on the seeds for tuning by multiple of the learning rate, None where a run diverged; empty where
            nothing was tuned.
        step: time of a training step of the final model, measured in turn with the others; None where it was not.
    """

    name: str
    entries: tuple[Entry, ...]
    tuned: Mapping[float, float | None]
    step: StepTime | None

    @property
    def title(self) -> str:
        """For people."""
        return METHODS[self.name].title if self.name in METHODS else self.entries[0].run.label

    @property
    def multiple(self) -> float:
        """Of the preset's learning rate, with which the runs were made."""
        return self.entries[0].lr_multiple

    @property
    def at_the_edge(self) -> bool:
        """Whether the best multiple is the largest or smallest that was tried."""
        return bool(self.tuned) and self.multiple in (min(self.tuned), max(self.tuned))

    @property
    def scores(self) -> dict[int, float]:
        """By seed; without runs that diverged."""
        return {entry.seed: entry.score for entry in self.entries if entry.score is not None}

    @property
    def score(self) -> Estimate | None:
        """Over the seeds."""
        return estimate(list(self.scores.values())) if self.scores else None

    @property
    def diverged(self) -> int:
        """Runs without a result."""
        return sum(entry.score is None for entry in self.entries)

    @property
    def states(self) -> list[int]:
        """Of all layers together at the end, of every run."""
        return [sum(entry.run.final_states) for entry in self.entries]

    def mean(self, what: str) -> float | None:
        """Over the runs, of ``seconds_training``, ``state_bytes`` or ``parameters``; None where one does not say."""
        values = [entry.run.parameters if what == "parameters" else getattr(entry, what) for entry in self.entries]
        return mean_of_all(values)

    def to_quality(self, quality: float) -> tuple[int, float | None, float | None]:
        """How many runs became as good as ``quality``, and the means over these of steps and of seconds until then."""
        found = [reached for entry in self.entries if (reached := entry.reached(quality)) is not None]
        if not found:
            return 0, None, None
        return len(found), mean_of_all([step for step, _ in found]), mean_of_all([elapsed for _, elapsed in found])


@dataclass(frozen=True)
class Pair:
    """Two methods on the same seeds.

    Attributes:
        ours, theirs: names of the methods.
        difference: of the scores, ours minus theirs.
        p: that of the difference, corrected for the number of pairs.
        verdict: ``"better"`` or ``"worse"`` of ours, or ``"not resolved"``.
    """

    ours: str
    theirs: str
    difference: Difference
    p: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """All of it.

    Attributes:
        design: what was asked for.
        arms: the methods that have a finished run, in the order of the report.
        pairs: that share a seed.
        quality: value of the metric until which steps and seconds are counted; None where no run has a result.
    """

    design: Design
    arms: tuple[Arm, ...]
    pairs: tuple[Pair, ...]
    quality: float | None

    @property
    def entries(self) -> list[Entry]:
        """Of all arms."""
        return [entry for arm in self.arms for entry in arm.entries]

    @property
    def metric(self) -> Metric:
        """That all are judged by."""
        return self.arms[0].entries[0].measure

    @property
    def missing(self) -> int:
        """Runs that are not done."""
        return len(self.design.report_jobs()) - len(self.entries)

    def arm(self, name: str) -> Arm:
        """Of a method."""
        return next(arm for arm in self.arms if arm.name == name)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "preset": self.design.preset,
            "metric": self.metric.key,
            "quality": self.quality,
            "level": LEVEL,
            "arms": [self._arm(arm) for arm in self.arms],
            "pairs": [{**vars(pair), "difference": vars(pair.difference)} for pair in self.pairs],
        }

    def _arm(self, arm: Arm) -> dict[str, Any]:
        reached, steps, seconds = (0, None, None) if self.quality is None else arm.to_quality(self.quality)
        return {
            "name": arm.name,
            "title": arm.title,
            "lr_multiple": arm.multiple,
            "tuned": [{"lr_multiple": multiple, "score": score} for multiple, score in arm.tuned.items()],
            "seeds": [entry.seed for entry in arm.entries],
            "scores": [entry.score for entry in arm.entries],
            "score": None if arm.score is None else vars(arm.score),
            "states": arm.states,
            **{what: arm.mean(what) for what in ("parameters", "state_bytes", "seconds_training")},
            "seconds_per_step": None if arm.step is None else arm.step.median,
            "to_quality": {"reached": reached, "steps": steps, "seconds": seconds},
        }


def gather(design: Design, out: Path, *, quality: float | None = None, all_pairs: bool = False) -> Comparison | None:
    """Read what the runs of a comparison left.

    Args:
        design: the comparison.
        out: its folder.
        quality: steps and seconds are counted until the metric has this value; None: the median over the methods of their
            mean scores.
        all_pairs: compare every method with every other; else the first with all others.

    Returns:
        None where no run is done that can be reported on.

    Raises:
        DataError: a record cannot be read.
    """
    timed = _read_timing(out / TIMING_FILE)
    arms = []
    for name in design.methods:
        done = [job for job in design.report_jobs() if job.method == name and is_done(job, out)]
        if done:
            tuned = mean_scores([read_entry(job.path(out, ".json")) for job in design.tuning_jobs(name)])
            arms.append(Arm(name, tuple(read_entry(job.path(out, ".json")) for job in done), tuned, timed.get(name)))
    if not arms:
        return None
    if quality is None:
        means = [arm.score.mean for arm in arms if arm.score is not None]
        quality = statistics.median(means) if means else None
    return Comparison(design, tuple(arms), tuple(compare(arms, all_pairs=all_pairs)), quality)


def compare(arms: Sequence[Arm], *, all_pairs: bool = False) -> list[Pair]:
    """The pairs of methods that share a seed, and which of each is better, at most 5 % of such tables being wrong anywhere."""
    chosen = [(ours, theirs) for ours, theirs in combinations(arms, 2) if all_pairs or ours is arms[0]]
    shared = [(ours, theirs, [seed for seed in ours.scores if seed in theirs.scores]) for ours, theirs in chosen]
    found = [
        (ours, theirs, paired([ours.scores[seed] for seed in seeds], [theirs.scores[seed] for seed in seeds]))
        for ours, theirs, seeds in shared if seeds
    ]  # fmt: skip
    pairs = []
    for (ours, theirs, gap), p in zip(found, holm([gap.p for _, _, gap in found]), strict=True):
        better = (gap.mean > 0) == ours.entries[0].measure.higher_is_better
        verdict = ("better" if better else "worse") if p < 1 - LEVEL else "not resolved"
        pairs.append(Pair(ours.name, theirs.name, gap, p, verdict))
    return pairs


def time_steps(design: Design, out: Path) -> None:
    """Time a training step of the final models of the first seed in turn, unless that was done for these methods.

    Raises:
        CompressmError: a model cannot be had, or the result cannot be written.
    """
    jobs = [Job(name, design.base.seed) for name in design.methods]
    fine = [job for job in jobs if not read_entry(job.path(out, ".json")).diverged]
    if not design.base.timing_rounds or _read_timing(out / TIMING_FILE).keys() == {job.method for job in fine}:
        return
    timing = time_final_models([restored(design, job, out) for job in fine], design.base.timing_rounds)
    body = {"seed": design.base.seed, "machine": machine(pick_device(design.base.device)), **timing}
    write_text(out / TIMING_FILE, json.dumps(body, indent=1))


def _read_timing(path: Path) -> dict[str, StepTime]:
    """Step times by method; empty where they were not measured."""
    if not path.exists():
        return {}
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))["steps"]
        return {step["name"]: StepTime.model_validate(step) for step in steps}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Delete it to have steps timed again") from error


