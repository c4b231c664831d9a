"""A training command: its runs one after the other, an interleaved timing of what they ended with, and the report."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

import compressm
from compressm.compression.common.files import write_atomically
from compressm.errors import CheckpointError, ConfigError
from compressm.experiments.declared import COMMAND_FILE, REPORT_FILE, check_unfinished
from compressm.experiments.freed_memory import freed_memory_kept
from compressm.experiments.methods import METHODS
from compressm.experiments.reports.data import FORMAT
from compressm.experiments.reports.html import write_html
from compressm.experiments.settings import read_settings, resolve
from compressm.experiments.tasks.settings import Settings
from compressm.experiments.tasks.task import make_task
from compressm.experiments.training import Observer, TrainingRun, count_parameters, pick_device

PAGE_FILE = "report.html"


class Display(Observer, Protocol):
    """What the command tells while it works."""

    def started(self, run: str, title: str, steps: int, parameters: int, states: Sequence[int]) -> None:
        """A run begins or goes on."""

    def message(self, text: str) -> None:
        """One line for the user."""


@dataclass(frozen=True)
class Command:
    """What ``compressm train`` was asked for.

    Attributes:
        preset: name of the preset.
        settings: resolved.
        data_dir: folder of the data; None downloads them.
        resume: go on with what lies in the output folder.
    """

    preset: str
    settings: Settings
    data_dir: str | None
    resume: bool = False

    def write(self, out: Path) -> None:
        body = {"preset": self.preset, "data_dir": self.data_dir, "settings": self.settings.to_dict()}
        write_text(out / COMMAND_FILE, json.dumps(body, indent=1))


class Interrupted(Exception):
    """The user or the system stopped the command; checkpoints are complete."""

    def __init__(self, run: str, step: int) -> None:
        super().__init__(f"stopped at step {step} of the run {run!r}")


def prepare(
    preset: str, overrides: dict[str, Any], out: Path, data_dir: str | None, *, resume: bool, overwrite: bool
) -> Command:
    """Resolve the settings, and settle what is to happen to what is already in the output folder.  Changes nothing.

    Raises:
        ConfigError: unknown preset, key or value; an unfinished command in ``out`` that is neither resumed nor overwritten; or
            a resumed one with other settings.
    """
    command = Command(preset, resolve(preset, overrides), data_dir)
    earlier = _earlier(out)
    if earlier is not None and resume:
        _check_same(earlier, preset, overrides, out)
        return Command(preset, earlier.settings, data_dir or earlier.data_dir, resume=True)
    if not overwrite:
        check_unfinished(out)
    return command


def _clear(command: Command, out: Path) -> None:
    """Make the output folder ready for a command that starts anew."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in METHODS:
            checkpoint_path(out, name).unlink(missing_ok=True)
        for name in (REPORT_FILE, PAGE_FILE):
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"--out {out}: {error.strerror}, expected a folder that can be written") from error
    command.write(out)


@freed_memory_kept()
def execute(command: Command, out: Path, display: Display, stopped: Callable[[], bool]) -> dict[str, Any]:
    """Do all runs of a command that are not done yet, time their final models, and write the report.

    Returns:
        the content of ``report.json``.

    Raises:
        Interrupted: ``stopped()`` became true; the same command with ``--resume`` goes on from there.
        CompressmError: see the messages.
    """
    settings = command.settings
    device = pick_device(settings.device)
    task = make_task(settings, Path(command.data_dir) if command.data_dir is not None else None, device)
    if not command.resume:
        _clear(command, out)
    display.message(f"[bold]{settings.title}[/] (seed {settings.seed}) into {out}")
    plan = task.model.kernel_plan(task.objective.length, device)  # builds the C++ kernels, if ever, before any clock runs
    display.message(f"at full size each layer runs {plan}")
    finished: list[TrainingRun] = []
    for name in settings.runs:
        run = TrainingRun(METHODS[name], task, checkpoint_path(out, name), finished)
        if run.path.exists():
            run.restore()
        display.started(name, run.method.title, settings.steps, count_parameters(run.model), run.model.states)
        if run.record.curve:
            display.point(name, run.record.curve[-1])
        if run.record.evaluations:
            display.evaluation(name, run.record.evaluations[-1])
        if not run.train(display, stopped):
            raise Interrupted(name, run.record.step)
        finished.append(run)
    report = {
        "format": FORMAT,
        "preset": command.preset,
        "title": settings.title,
        "metric": task.objective.metric.key,
        "notes": list(task.notes),
        "config": settings.to_dict(),
        "machine": machine(device),
        "dataset": task.describe(),
        "runs": [run.summary() for run in finished],
    }
    if settings.timing_rounds:
        display.message(f"timing the final models in turn, {settings.timing_rounds} rounds")
        report["timing"] = time_final_models(finished, settings.timing_rounds)
    write_text(out / REPORT_FILE, json.dumps(report, indent=1, allow_nan=False))
    write_html(report, out / PAGE_FILE)
    return report


def time_final_models(runs: Sequence[TrainingRun], rounds: int) -> dict[str, Any]:
    """Median and spread of a training step of every final model, measured in turn; the models train on meanwhile."""
    samples: dict[str, list[float]] = {run.name: [] for run in runs}
    synchronize = torch.cuda.synchronize if runs[0].task.device.type == "cuda" else lambda: None
    for _ in range(rounds):
        for run in runs:
            run.train_step()
            synchronize()
            started = time.perf_counter()
            run.train_step()
            synchronize()
            samples[run.name].append(time.perf_counter() - started)
    steps = []
    for name, values in samples.items():
        ordered, last = sorted(values), len(values) - 1
        low, high = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
        steps.append({"name": name, "median": statistics.median(values), "p20": low, "p80": high})
    return {"repeats": rounds, "steps": steps}


def checkpoint_path(out: Path, run: str) -> Path:
    """Where a run's checkpoint lies."""
    return out / f"{run}.safetensors"


def machine(device: torch.device) -> dict[str, Any]:
    """Where the figures were measured."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    found = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compressm": compressm.__version__,
    }
    return found


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one go.

    Raises:
        CheckpointError: it cannot be written; the old one is untouched.
    """
    try:
        write_atomically(path, f"{text}\n".encode())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}). Free space or choose another --out") from error


def _earlier(out: Path) -> Command | None:
    path = out / COMMAND_FILE
    if not path.exists():
        return None
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        return Command(body["preset"], read_settings(body["settings"]), body["data_dir"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}), expected what compressm train wrote. Use --overwrite") from error


def _check_same(earlier: Command, preset: str, overrides: dict[str, Any], out: Path) -> None:
    if earlier.preset != preset:
        raise ConfigError(f"--resume: {out} holds a {earlier.preset!r} command, got preset {preset!r}")
    asked, meant = resolve(preset, overrides), earlier.settings.to_dict()
    for key in overrides:
        was, now = getattr(earlier.settings, key), getattr(asked, key)
        if was != now and key in meant:
            raise ConfigError(f"--resume: {key} was {was!r} when {out} was started, got {now!r}. Leave it out, or start anew")
