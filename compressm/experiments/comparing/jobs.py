"""One run of a comparison, from its settings to its record; resumed where a checkpoint is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from compressm.errors import NumericalError
from compressm.experiments.comparing.design import Design, Job
from compressm.experiments.comparing.records import Entry, read_entry, write_entry
from compressm.experiments.comparing.statistics import mean_of_all
from compressm.experiments.methods import METHODS
from compressm.experiments.tasks.datasets import DATASETS
from compressm.experiments.tasks.task import Task
from compressm.experiments.training import Observer, TrainingRun, pick_device


def run_job(design: Design, job: Job, out: Path, observer: Observer, stopped: Callable[[], bool]) -> bool:
    """Do one run, and write its record; those that it needs must be done.

    Args:
        design: the comparison.
        job: the run.
        out: the output folder.
        observer: is told how it goes on.
        stopped: becomes true to end it early.

    Returns:
        False if it was ended early; it goes on from its checkpoint the next time.

    Raises:
        CompressmError: see the messages; divergence is a result and not among them.
    """
    multiple = chosen_multiple(design, job.method, out) if job.multiple is None else job.multiple
    earlier = [_counterpart(design, job, name, out) for name in design.needs(job.method)]
    failed = [other.method for other in earlier if read_entry(other.path(out, ".json")).diverged]
    finished = [] if failed else [restored(design, other, out) for other in earlier]
    run = TrainingRun(METHODS[job.method], make_task(design, job, multiple), job.path(out, ".safetensors"), finished)
    reason = f"takes over from {failed[0]!r}, which diverged" if failed else ""
    if not failed:
        if run.path.exists():
            run.restore()
        try:
            if not run.train(observer, stopped):
                return False
        except NumericalError as error:
            reason = str(error)
    teachers = sum(other.record.seconds_training for other in finished if other.name in run.method.teachers)
    write_entry(job.path(out, ".json"), design.preset, job, run, multiple=multiple, teachers=teachers, diverged=reason)
    return True


def restored(design: Design, job: Job, out: Path) -> TrainingRun:
    """A run that is done, at its end."""
    multiple = read_entry(job.path(out, ".json")).lr_multiple
    finished = [restored(design, _counterpart(design, job, name, out), out) for name in design.needs(job.method)]
    run = TrainingRun(METHODS[job.method], make_task(design, job, multiple), job.path(out, ".safetensors"), finished)
    run.restore()
    return run


def make_task(design: Design, job: Job, multiple: float) -> Task:
    """The task of a run, its data loaded; for tuning, examples held out of training take the place of the test part."""
    settings = design.settings(job, multiple)
    data = DATASETS[settings.dataset](settings).load(None if design.data_dir is None else Path(design.data_dir))
    return Task(settings, data.held_out() if job.tuning else data, pick_device(settings.device))


def chosen_multiple(design: Design, method: str, out: Path) -> float:
    """The multiple of the learning rate with which a method did best on the seeds for tuning; 1 where nothing is tuned."""
    if not design.multiples:
        return 1.0
    return best_multiple([read_entry(job.path(out, ".json")) for job in design.tuning_jobs(method)])


def best_multiple(entries: Sequence[Entry]) -> float:
    """That with the best mean score; one with which a run diverged only if no other is left, and then the lowest."""
    means = mean_scores(entries)
    found = {multiple: mean for multiple, mean in means.items() if mean is not None}
    if not found:
        return min(means)
    best = max if entries[0].measure.higher_is_better else min
    return best(found, key=found.__getitem__)


def mean_scores(entries: Sequence[Entry]) -> Mapping[float, float | None]:
    """By multiple, in the order of the entries, the mean of the scores; None where a run has none."""
    scores: dict[float, list[float | None]] = {}
    for entry in entries:
        scores.setdefault(entry.lr_multiple, []).append(entry.score)
    return {multiple: mean_of_all(values) for multiple, values in scores.items()}


def _counterpart(design: Design, job: Job, method: str, out: Path) -> Job:
    """The run of another method that a run takes something over from: with the same seed, and tuned."""
    return Job(method, job.seed, chosen_multiple(design, method, out) if job.tuning else None)
