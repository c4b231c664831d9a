"""One training run: model, optimizer, compressor and what they did, resumable at any step to the same result."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

import compressm
from compressm.compression import GuardReport
from compressm.errors import CheckpointError, ConfigError, NumericalError
from compressm.experiments.methods import Method
from compressm.experiments.tasks.batches import step_seed
from compressm.experiments.tasks.parts import BlockModel
from compressm.experiments.tasks.task import Task

CHECKPOINT_SECONDS = 30.0


class Observer(Protocol):
    """Who is told how a run goes on."""

    def point(self, run: str, point: dict[str, Any]) -> None:
        """A new point of the training curve."""

    def evaluation(self, run: str, evaluation: dict[str, Any]) -> None:
        """The task's metric and the loss on the split that the metric watches."""

    def reduction(self, run: str, reduction: dict[str, Any]) -> None:
        """A reduction was made."""


@dataclass
class Record:
    """What a run did so far, a JSON tree.

    ``window`` gathers what the next point of the curve will say: sums over its steps.  ``test`` is what the run ended with.
    ``verdicts`` are what a guard decided about reductions; of those that it undid nothing else remains.
    """

    step: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    reductions: list[dict[str, Any]] = field(default_factory=list)
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    seconds_training: float = 0.0
    seconds_total: float = 0.0
    window: dict[str, float] = field(default_factory=lambda: {"loss": 0.0, "tally": 0.0, "steps": 0, "seconds": 0.0})
    test: dict[str, Any] = field(default_factory=dict)

    def go_back(self, step: int) -> None:
        """Forget what came after a step, and the reduction that was made then."""
        self.step = step
        self.curve = [point for point in self.curve if point["step"] <= step]
        self.evaluations = [evaluation for evaluation in self.evaluations if evaluation["step"] < step]
        self.reductions = [reduction for reduction in self.reductions if reduction["step"] < step]


class _Recent:
    """Two numbers of every step, left on their device until they are taken.

    They are copied to one place: small tensors that live on between a step's large ones would keep the allocator from using
    that memory again.
    """

    capacity = 128

    def __init__(self) -> None:
        self._places: tuple[tuple[torch.Tensor, ...], ...] = ()  # of each number, a view for every step
        self._count = 0

    @property
    def full(self) -> bool:
        return self._count == self.capacity

    def append(self, *numbers: torch.Tensor) -> None:
        if not self._places:
            self._places = tuple(torch.empty(self.capacity, dtype=n.dtype, device=n.device).unbind() for n in numbers)
        for places, number in zip(self._places, numbers, strict=True):
            places[self._count].copy_(number)
        self._count += 1

    def take(self) -> tuple[list[float], list[float]]:
        """The numbers of the steps since the last time."""
        count, self._count = self._count, 0
        if count == 0:
            return [], []
        first, second = (torch.stack(places[:count]).double().tolist() for places in self._places)
        return first, second


class TrainingRun:
    """One model on its way.

    Args:
        method: by which it is trained.
        task: with its settings and data.
        path: of the checkpoint.
        finished: the runs before this one.
    """

    def __init__(self, method: Method, task: Task, path: Path, finished: Sequence[TrainingRun] = ()) -> None:
        self.method, self.task, self.settings, self.path = method, task, task.settings, path
        self.finished = tuple(finished)
        self.model: BlockModel = method.start(task, method.states(task, finished))
        self.optimizer = torch.optim.AdamW(task.model.parameter_groups(self.model), fused=True)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, method.rate(self.settings))
        self.state = method.state(self, finished)
        self.compressor = method.compressor(self)
        if self.compressor is not None:
            own = {} if self.state is None else {"method": self.state}
            self.compressor.register(scheduler=self.scheduler, **own)
        self.record = Record()
        self._recent = _Recent()  # loss and tally of the steps not yet in the record

    @property
    def name(self) -> str:
        """The method's."""
        return self.method.name

    def train(self, observer: Observer, stopped: Callable[[], bool]) -> bool:
        """Train to the end, with a checkpoint now and then.

        Returns:
            False if ``stopped()`` ended it early; a checkpoint of the last step is there then.

        Raises:
            NumericalError: the loss became NaN or infinite.
            CheckpointError: a checkpoint cannot be written.
        """
        settings, record = self.settings, self.record
        clock = saved = time.perf_counter()
        while record.step < settings.steps:
            started = time.perf_counter()
            self.train_step()
            record.step += 1
            record.window["steps"] += 1
            record.window["seconds"] += time.perf_counter() - started
            due = self.compressor is not None and self.compressor.due
            if due or self._looks() or record.step % settings.log_every == 0:
                self._close_window(observer)
            if self.compressor is not None:
                self._reduce(self.compressor, observer, due)  # may go back to an earlier step
            at_end = record.step == settings.steps
            if self._looks():
                self._evaluate(observer, at_end)
            now = time.perf_counter()
            record.seconds_total, clock = record.seconds_total + now - clock, now
            stop = stopped() and not at_end
            if stop or at_end or now - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = time.perf_counter()
            if stop:
                return False
        return True

    def _looks(self) -> bool:
        """Whether the model is evaluated at this step."""
        return self.record.step == self.settings.steps or self.record.step % self.settings.eval_every == 0

    def train_step(self) -> None:
        """One optimizer step on the next batch."""
        step = self.record.step
        self._seed(step_seed(self.settings.seed, step))
        if not self.model.training:
            self.model.train()
        with self._autocast():
            loss, tally, total = self._forward(step)
        total.backward()
        if self.settings.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self._recent.append(loss.detach(), tally)
        if self._recent.full:
            self._add_recent()

    def _forward(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The objective's loss on the batch of a step, its tally, and the loss with what the method adds."""
        outcome = self.task.objective.outcome(self.model, self.task.objective.batches[step])
        extra = self.method.loss(self, outcome)
        return outcome.loss, outcome.tally, outcome.loss if extra is None else outcome.loss + extra

    def _autocast(self) -> AbstractContextManager:
        return nullcontext() if self.settings.autocast is None else torch.autocast(self.task.device.type, torch.bfloat16)

    def _seed(self, seed: int) -> None:
        """Seed the generators that the step may draw from."""
        if self.task.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed formats a traceback for every absent accelerator
        else:
            torch.manual_seed(seed)

    def _gather(self) -> None:
        """Move losses and tallies from the device into the record's window, whose time this counts for."""
        started = time.perf_counter()
        self._add_recent()
        self.record.window["seconds"] += time.perf_counter() - started

    def _add_recent(self) -> None:
        for key, values in zip(("loss", "tally"), self._recent.take(), strict=True):
            for value in values:
                self.record.window[key] += value

    def _close_window(self, observer: Observer) -> None:
        self._gather()
        window, record = self.record.window, self.record
        steps = int(window["steps"])
        loss = window["loss"] / steps
        if not math.isfinite(loss):
            raise NumericalError(
                f"run {self.name!r}: the loss is {loss} at step {record.step}: training has diverged. "
                f"Lower the learning rate (--set lr={self.settings.lr / 4:g})"
            )
        point = {
            "step": record.step,
            "loss": loss,
            self.task.objective.metric.key: self.task.objective.from_tally(window["tally"], steps),
            "seconds_per_step": window["seconds"] / steps,
            "states": self.model.states,
        }
        record.curve.append(point)
        record.seconds_training += window["seconds"]
        record.window = Record().window
        observer.point(self.name, point)

    def _reduce(self, compressor: compressm.Compressor, observer: Observer, due: bool) -> None:
        objective, metric = self.task.objective, self.task.objective.metric
        before = objective.evaluate(self.model, metric.watched) if due else {}
        started = time.perf_counter()
        report = compressor.step()
        if report is None:
            return
        self.record.seconds_training += time.perf_counter() - started
        after = objective.evaluate(self.model, metric.watched)
        sides = {f"{metric.key}_before": before[metric.key], f"{metric.key}_after": after[metric.key]}
        made = {**report.to_dict(), **sides}
        if isinstance(report, GuardReport):
            self.record.verdicts.append(made)
            if report.changed:
                self.record.go_back(report.resumed_at)
            return
        self.record.reductions.append(made)
        observer.reduction(self.name, made)

    def _evaluate(self, observer: Observer, at_end: bool) -> None:
        objective = self.task.objective
        quality = objective.evaluate(self.model, objective.metric.watched)
        evaluation = {"step": self.record.step, **quality}
        self.record.evaluations.append(evaluation)
        observer.evaluation(self.name, evaluation)
        if at_end:
            self.record.test = objective.result(self.model, quality)

    def save(self) -> None:
        """Write the checkpoint; it replaces the one before atomically."""
        self._gather()
        extra = {
            "run": self.name,
            "settings": self.settings.to_dict(),
            "dataset": self.task.describe(),
            "scheduler": self.scheduler.state_dict(),
            "record": asdict(self.record),
            **({} if self.state is None else {"method": self.state.state_dict()}),
        }
        compressm.save(self.path, self.model, optimizer=self.optimizer, compressor=self.compressor, extra=extra)

    def restore(self) -> None:
        """Continue from the checkpoint.

        Raises:
            CheckpointError: damaged, of another run, or trained on other data.
        """
        extra = compressm.load(self.path, self.model, optimizer=self.optimizer, compressor=self.compressor)
        needed = {"record", "scheduler"} if self.state is None else {"record", "scheduler", "method"}
        if not isinstance(extra, dict) or extra.get("run") != self.name or not needed <= extra.keys():
            raise CheckpointError(f"{self.path}: expected a checkpoint of the run {self.name!r}. Delete it to start anew")
        was, now = extra.get("dataset", {}), self.task.describe()
        if changed := [key for key in now if key != "name" and was.get(key) != now[key]]:
            found = ", ".join(f"{key} {was.get(key)}, now {now[key]}" for key in changed)
            raise CheckpointError(f"{self.path}: the data have changed ({found}). Give the old ones (--data-dir) or start anew")
        self.record = Record(**extra["record"])
        self.scheduler.load_state_dict(extra["scheduler"])
        if self.state is not None:
            self.state.load_state_dict(extra["method"])

    def summary(self) -> dict[str, Any]:
        """The run as ``report.json`` holds it."""
        record = self.record
        states = {f"blocks.{i}.{self.task.model.mixer}": n for i, n in enumerate(self.model.states)}
        recent = [p["seconds_per_step"] for p in record.curve if p["states"] == self.model.states]
        return {
            "name": self.name,
            "title": self.method.title,
            "steps": record.step,
            "seed": self.settings.seed,
            "parameters": count_parameters(self.model),
            "curve": record.curve,
            "evaluations": record.evaluations,
            "reductions": record.reductions,
            "verdicts": record.verdicts,
            "stability": self._stability(),
            "final": {
                **record.test,
                "states": states,
                "seconds_total": record.seconds_total,
                "seconds_training": record.seconds_training,
                "seconds_per_step": statistics.median(recent) if recent else None,
            },
        }


    def _stability(self) -> dict[str, Any]:
        """By layer, where spectra were measured more than once."""
        layers = {} if self.compressor is None else self.compressor.stability().layers
        return {name: asdict(layer) for name, layer in layers.items() if len(layer.steps) > 1}


def count_parameters(model: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def pick_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: unknown, or not on this machine.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device: got {name!r}, which cannot be used here ({reason}). Try cpu or cuda") from error
    return device
