"""The Compressor, which shrinks a model while it trains."""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compressm.compression.audit import Ema, check_ema, check_optimizers
from compressm.compression.distributed import team_of
from compressm.compression.execution import as_optimizers, check_kind, choose_recipe, execute, finish
from compressm.compression.moments import check_moments
from compressm.compression.planning import Calibration, Planned, analyse, compressible_layers, make_plan
from compressm.compression.policies import Policy, check_multiple
from compressm.compression.report import ReductionPlan, ReductionReport
from compressm.compression.schedules import Schedule
from compressm.errors import CompressmError, bad_argument

STATE_FORMAT = 1
Forward = Callable[[nn.Module, Any], Any]


class ScheduleWarning(UserWarning):
    """Reductions that were scheduled have not happened."""


class Compressor:
    """Shrinks the state-space layers of a model during training; call :meth:`step` after every ``optimizer.step()``.

    The optimizer object survives: parameters are replaced inside its groups, its moments are carried through the change of
    basis, schedulers keep working.  ``with Compressor(...) as compressor`` complains at the end about scheduled reductions
    that never came.

    Args:
        model: a plain module, or one wrapped in DistributedDataParallel (call :meth:`rewrap` after every step) or sharded by
            ``fully_shard``, with a Compressor on every process; a ``torch.compile`` wrapper is looked through.
        optimizer: the one that trains it, or a sequence of several; None if nothing trains.
        policy: how many states stay (Energy, FixedRank, Shrink).
        schedule: when (Once, Warmup, Every, At), in optimizer steps.
        calibration: iterable of batches for data Gramians (each a tensor, a tuple with the input first, or a dict of keyword
            arguments; a DataLoader is fine), on several processes each its own part; None: data-free Gramians.
        recipe: None or ``"default"``: real 2N-state spectrum, one tau budget for all attempts, transported moments.
            ``"paper"``: CompreSSM as its authors run it: complex spectrum, data-free, the full tau at every attempt, sliced
            moments; selective layers by the time-invariant mean of every channel, over ``calibration`` if there is one.
            Use it with ``Warmup(total_steps)``.
        forward: ``forward(model, batch) -> output`` for calibrating models that are called differently.
        ema: averaged copy that follows: ``AveragedModel``, another module of the same structure, or a dict of names to tensors.
        moments: ``"transport"``, ``"reset"`` or ``"slice"``; None takes the recipe's.
        multiple_of: ranks are rounded up to a multiple of this.
        uniform: all layers keep as many states as the one that needs most, for servers that expect one state size.
        sequences: at most so many calibration sequences, over all processes.

    Raises:
        ArgumentError, ModelError, OptimizerError, DistributedError: see the messages; nothing has changed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
        *,
        policy: Policy,
        schedule: Schedule,
        calibration: Iterable[Any] | None = None,
        recipe: str | None = None,
        forward: Forward | None = None,
        ema: Ema | None = None,
        moments: str | None = None,
        multiple_of: int = 1,
        uniform: bool = False,
        sequences: int = 64,
    ) -> None:
        self.optimizers = as_optimizers(optimizer)
        self.team = team_of(model, self.optimizers)
        self.model = self.team.model
        self.layers = compressible_layers(self.model)
        self.policy, self.schedule = check_kind(policy, Policy, "policy"), check_kind(schedule, Schedule, "schedule")
        self.recipe = choose_recipe(recipe, calibration, self.layers)
        self.moments = moments if moments is not None else self.recipe.moments
        self.multiple_of, self.uniform, self.ema = multiple_of, uniform, ema
        check_moments(self.moments)
        check_multiple(multiple_of)
        self.calibration = Calibration(_replayable(calibration), forward, sequences, self.team)
        self.team.check(self.layers, ema)
        self.policy.check_layers(self.ranks)
        if self.optimizers:
            check_optimizers(self.layers, self.model, self.optimizers)
        if ema is not None:
            check_ema(ema, self.model, self.layers)
        self.team.same("arguments of the Compressor", self._arguments())
        self.history: list[ReductionReport] = []
        self._step = self._attempts = self._calls = 0
        self._kept = dict.fromkeys(self.layers, 1.0)
        self._watch = _watch(self) if self.optimizers else None

    @property
    def ranks(self) -> dict[str, int]:
        """States per layer now, by module name."""
        return {name: adapter.rank(module) for name, (module, adapter) in self.layers.items()}

    @property
    def step_count(self) -> int:
        """How often :meth:`step` has been called, over all resumed runs."""
        return self._step

    def plan(self) -> ReductionPlan:
        """What an attempt would do now.  Changes nothing.

        Raises:
            NumericalError, DataError: the model or the calibration data do not allow an answer.
        """
        return self._plan().plan

    def step(self) -> ReductionReport | None:
        """Count one optimizer step, and reduce if the schedule says so.

        Returns:
            what was done, or None if nothing was due.

        Raises:
            CompressmError: the reduction is not possible; model, optimizer and EMA are unchanged.
        """
        self.team.ready()
        self._step += 1
        self._calls += 1
        if not self.schedule.due(self._step):
            return None
        started = time.perf_counter()
        planned = self._plan()
        execute(self.model, planned, optimizers=self.optimizers, ema=self.ema, moments=self.moments, team=self.team)
        reason = f"attempt {self._attempts + 1} of {self.schedule.attempts}, {self.policy}, recipe {self.recipe.name}"
        report = finish(planned, self._step, reason, started)
        self._attempts += 1
        for layer in report.layers:
            self._kept[layer.name] *= 1 - layer.discarded
        self.history.append(report)
        return report

    def rewrap(self) -> nn.Module:
        """The model to train on: call it after every :meth:`step` of a DistributedDataParallel model.

        Returns:
            the same wrapper as before, or after a reduction a new DistributedDataParallel with the old one's options around
            the same module; the old one raises when it is called.  Other models come back as they are.
        """
        return self.team.rewrap()

    def close(self) -> None:
        """Say goodbye at the end of training.

        Raises:
            CompressmError: :meth:`step` was never called.

        Warns:
            ScheduleWarning: training ended before some scheduled reductions.
        """
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        if self._step == 0:
            raise CompressmError(
                f"Compressor.step() was never called, expected one call after every optimizer.step() "
                f"(first reduction due at step {self.schedule.steps[0]}). The model has not been compressed"
            )
        missed = [step for step in self.schedule.steps if step > self._step]
        if missed:
            warnings.warn(
                f"training ended at step {self._step}, before the reductions scheduled at {missed}; shorten the schedule "
                "(its total_steps) or train longer",
                ScheduleWarning,
                stacklevel=2,
            )

    def __enter__(self) -> Compressor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state for resuming in mid-schedule."""
        return {
            "format": STATE_FORMAT,
            "recipe": self.recipe.name,
            "policy": repr(self.policy),
            "schedule": repr(self.schedule),
            "step": self._step,
            "attempts": self._attempts,
            "kept": dict(self._kept),
            "ranks": self.ranks,
            "history": [report.to_dict() for report in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; the model must have the ranks it had then.

        Raises:
            ArgumentError: of another format, recipe or model; nothing has changed.
        """
        self.check_state_dict(state)
        if dict(state["ranks"]) != self.ranks:
            remedy = "Load the model first: compressm.load(path, model, optimizer=..., compressor=...) does both"
            raise bad_argument("state_dict", got=f"ranks {state['ranks']}", expected=f"ranks {self.ranks}", remedy=remedy)
        self._step, self._attempts = int(state["step"]), int(state["attempts"])
        self._kept = {name: float(state["kept"][name]) for name in self.layers}
        self.history = [ReductionReport.from_dict(report) for report in state["history"]]
        self._calls = 0

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ArgumentError unless ``state`` fits this compressor's recipe and layers (ranks may differ)."""
        keys = {"format", "recipe", "step", "attempts", "kept", "ranks", "history"}
        if not isinstance(state, Mapping) or (missing := sorted(keys - state.keys())):
            got = f"without {', '.join(missing)}" if isinstance(state, Mapping) else type(state).__name__
            raise bad_argument("state_dict", got=got, expected="what Compressor.state_dict() returned")
        if state["format"] != STATE_FORMAT:
            raise bad_argument("state_dict format", got=state["format"], expected=str(STATE_FORMAT))
        if state["recipe"] != self.recipe.name:
            raise bad_argument("recipe", got=self.recipe.name, expected=f"{state['recipe']!r}, as in the saved run")
        if set(state["kept"]) != set(self.layers) or set(state["ranks"]) != set(self.layers):
            got, expected = f"layers {sorted(state['ranks'])}", f"layers {sorted(self.layers)}"
            raise bad_argument("state_dict", got=got, expected=expected)
        for report in state["history"]:
            ReductionReport.from_dict(report)

    def _plan(self) -> Planned:
        candidates = analyse(self.model, self.layers, self.recipe.convention, self.calibration)
        options = {"multiple_of": self.multiple_of, "uniform": self.uniform, "team": self.team}
        return make_plan(candidates, self.policy, keep=self._keep(), **options)

    def _arguments(self) -> list[Any]:
        """What must be the same on all processes that train the model together, JSON-ready."""
        named = [
            type(item).__qualname__ if type(item).__repr__ is object.__repr__ else repr(item)
            for item in (self.policy, self.schedule)
        ]
        chosen = [*named, self.recipe.name, self.moments, self.multiple_of, self.uniform, self.ema is None, self.ranks]
        return [*chosen, self.calibration.batches is None, self.calibration.sequences]

    def _keep(self) -> dict[str, float] | None:
        """Per layer, the fraction the next attempt must keep: an equal share of what is left of the budget."""
        budget = self.policy.budget
        if budget is None or not self.recipe.shared_budget:
            return None
        remaining = max(1, self.schedule.attempts - self._attempts)
        return {name: min(1.0, budget / kept) ** (1 / remaining) for name, kept in self._kept.items()}


class _Replay:
    """Remembers what an iterator gave, so that later reductions see the same calibration batches."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self.iterator, self.seen = iterator, []

    def __iter__(self) -> Iterator[Any]:
        yield from self.seen
        for batch in self.iterator:
            self.seen.append(batch)
            yield batch


def _replayable(batches: Iterable[Any] | None) -> Iterable[Any] | None:
    return _Replay(batches) if isinstance(batches, Iterator) else batches


def _watch(compressor: Compressor) -> Any:
    """Warn once if the optimizer passes the first scheduled step and step() was never called."""
    reference = weakref.ref(compressor)
    taken = 0

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal taken
        taken += 1
        owner = reference()
        if owner is None or owner._calls or owner._watch is None:
            return
        due = next((step for step in owner.schedule.steps if step > owner._step), None)
        if due is not None and taken == due - owner._step + 1:
            warnings.warn(
                f"the optimizer has taken {taken} steps but Compressor.step() was never called; the reduction due at step "
                f"{due} has not happened. Call compressor.step() after optimizer.step()",
                ScheduleWarning,
                stacklevel=3,
            )

    return compressor.optimizers[0].register_step_post_hook(hook)
