"""The Compressor, which shrinks a model while it trains."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from compressm.adapters import check_known
from compressm.compression.common.described import described
from compressm.compression.common.models import compressible_layers, judged
from compressm.compression.common.undisturbed import ordinary
from compressm.compression.compressor.cadence import Cadence
from compressm.compression.compressor.progress import STATE_FORMAT, Progress, check_progress, check_state
from compressm.compression.compressor.rates import check_factor, multiply_rates
from compressm.compression.compressor.recipes import check_kind, check_policy, choose_recipe, execute, finish, in_form, log
from compressm.compression.compressor.refining import Refinement, chosen_steps
from compressm.compression.distributed.wrapped import team_of
from compressm.compression.guard.probation import Guard, Probation, check_guard_state, check_taken_back
from compressm.compression.guard.rollback import Rollback
from compressm.compression.guard.snapshot import Parts, check_registrable
from compressm.compression.planning.batches import replayable
from compressm.compression.planning.calibration import Forward, rehearse
from compressm.compression.planning.plans import Calibration, Candidate, Demands, Planned, analyse, in_view, make_plan, raised
from compressm.compression.planning.policies import Policy
from compressm.compression.planning.report import GuardReport, ReductionPlan, ReductionReport, report_from_dict
from compressm.compression.planning.schedules import Look, Schedule
from compressm.compression.planning.stability import Sightings, Stability, parsed
from compressm.compression.surgery.audit import Ema, OptimizerArgument, as_optimizers, check_ema, check_optimizers
from compressm.compression.surgery.moments import check_moments
from compressm.control import Criterion, RowCriterion
from compressm.errors import CompressmError, bad_argument


class Compressor:
    """Shrinks the state-space layers of a model during training; call :meth:`step` after every ``optimizer.step()``.

    The optimizer object survives: parameters are replaced inside its groups, its moments are carried through the change of
    basis, schedulers keep working.  ``with Compressor(...) as compressor`` complains at the end about scheduled reductions
    that never came::

        with compressm.Compressor(
            model,
            optimizer,
            policy=compressm.Energy(tau=0.02),
            schedule=compressm.Once(total_steps, at=0.2),
            calibration=batches,
            guard=compressm.Rollback(evaluate, tolerance=0.005),
        ) as compressor:
            compressor.register(scheduler=scheduler)
            while compressor.step_count < total_steps:
                loss = ...
                loss.backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                report = compressor.step()

    Args:
        model: a plain module, or one wrapped in DistributedDataParallel (call :meth:`rewrap` after every step) or sharded by
            ``fully_shard``, with a Compressor on every process; a ``torch.compile`` wrapper is looked through.
        optimizer: the one that trains it, or a sequence of several; None if nothing trains.
        policy: how many states stay (Energy, FixedRank, Shrink, Budget, ErrorBound).
        schedule: when (Once, Warmup, Every, At, WhenStable), in optimizer steps.
        calibration: iterable of batches for data Gramians (each a tensor, a tuple with the input first, or a dict of keyword
            arguments; a DataLoader is fine, the one of training as well), on several processes each its own part; one sequence
            is tried at once, so at least one batch must be there; None: data-free Gramians.
        recipe: None or ``"default"``: real 2N-state spectrum, one tau budget for all attempts, transported moments.
            ``"paper"``: CompreSSM as its authors run it: complex spectrum, data-free, the full tau at every attempt, sliced
            moments; selective layers by the time-invariant mean of every channel, over ``calibration`` if there is one.
            Use it with ``Warmup(total_steps)``.
        form: what Mamba-2 layers become: ``"strict"``, layers of their class with fewer channels of B and C; ``"projected"``,
            layers with all of these and two maps (``B_map``, ``C_map``) to fewer states behind them, which lose several times
            less and are trained on: the optimizer gets them beside ``A_log``.  ``"auto"``: projected for compressm's own,
            strict for those of other libraries, which could not load the maps.
        forward: ``forward(model, batch) -> output`` for calibrating models that are called differently.
        ema: averaged copy that follows: ``AveragedModel``, another module of the same structure, or a dict of names to tensors.
        moments: ``"transport"``, ``"reset"`` or ``"slice"``; None takes the recipe's.
        multiple_of: ranks are rounded up to a multiple of this (tensor-core sizes), a Budget's so that it is met; those of
            FixedRank are taken as they are.  None: 16 for Mamba-2 layers of other libraries, whose kernels are no faster in
            between, and 1 for all others; a FixedRank that those kernels cannot run is refused.
        uniform: all layers keep as many states as the one that needs most, for servers that expect one state size; a Budget
            is met all the same.
        sequences: at most so many calibration sequences, over all processes.
        criterion: chooses the states that are kept, as they are, in the place of our reduction; policies see its scores as the
            spectrum.  For time-invariant layers a ``Criterion`` (``compressm.control.Magnitude``, ``PeakGain``, ``LAST``,
            ``ImpulseEnergy``, ``AIRE``, ``Modulus``), for selective layers and matrix-valued states, in their strict form, a
            ``RowCriterion`` (``GHOST``, ``OutputEnergy``, ``DRRQR``, ``Taylor``); ``RandomModes`` for both, or one of yours.
        refine: steps of local distillation in every reduction: what the cut leaves of a layer learns, on calibration sequences,
            to give what the layer gave, before training goes on.  For Mamba-2, the gated delta rule, Kimi Delta Attention and
            linear attention; None: 0, as training closes the gap by itself.
        lr_after: multiplies the learning rate at the first reduction that removes states, in all parameter groups and, where
            they are registered (:meth:`register`), in schedulers; 2 to 3 helped LRUs that were cut 8-fold.  None: it stays.
        guard: a :class:`Rollback` that validates every reduction and undoes it if need be; None: reductions are final.

    Raises:
        ArgumentError, ModelError, OptimizerError, DistributedError: see the messages; nothing has changed.
        DataError, NumericalError: the model cannot be measured on ``calibration``; nothing has changed.

    Warns:
        CalibrationWarning: the model's output depends on no layer's output by autograd, so that half is not measured.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerArgument,
        *,
        policy: Policy,
        schedule: Schedule,
        calibration: Iterable[Any] | None = None,
        recipe: str | None = None,
        form: str = "auto",
        forward: Forward | None = None,
        ema: Ema | None = None,
        moments: str | None = None,
        multiple_of: int | None = None,
        uniform: bool = False,
        sequences: int = 64,
        criterion: Criterion | RowCriterion | None = None,
        guard: Rollback | None = None,
        refine: int | None = None,
        lr_after: float | None = None,
    ) -> None:
        self.optimizers = as_optimizers(optimizer)
        self.team = team_of(model, self.optimizers)
        self.model = self.team.model
        layers = in_form(compressible_layers(self.model), form, self.team, self.optimizers)
        self.layers = judged(layers, criterion, form, calibration)
        check_known(self.layers)
        self.schedule = check_kind(schedule, Schedule, "schedule")
        self.recipe = choose_recipe(recipe, calibration, self.layers)
        self.demands = Demands(multiple_of, uniform)
        self.moments = check_moments(self.recipe.moments if moments is None else moments)
        self.ema, self.lr_after = ema, check_factor(lr_after)
        self.calibration = Calibration(replayable(calibration), forward, sequences, self.team)
        self.refine = chosen_steps(refine, 0, self.layers, calibration, self.team)
        self.team.check(self.layers, ema)
        self.policy = check_policy(policy, self.layers, self.demands, self.recipe, calibration)
        check_optimizers(self.layers, self.model, self.optimizers)
        if ema is not None:
            check_ema(ema, self.model, self.layers)
        self.history: list[ReductionReport | GuardReport] = []
        rule = None if guard is None else check_kind(guard, Rollback, "guard")
        self.guard = None if rule is None else Guard(rule, self.schedule, self.team, self.optimizers)
        self.registered: dict[str, Any] = {}
        self.team.same("arguments of the Compressor", self._arguments())
        self._progress = Progress(kept=dict.fromkeys(self.layers, 1.0))
        self._sightings = Sightings(bounded=self.schedule.adaptive)
        if (batches := self.calibration.batches) is not None:
            rehearse(self.model, self.layers, batches, forward=forward, sequences=sequences, team=self.team)
        self._cadence = Cadence(self.schedule, self.optimizers) if self.optimizers else None

    @property
    def ranks(self) -> dict[str, int]:
        """States per layer now, by module name."""
        return {name: adapter.rank(module) for name, (module, adapter) in self.layers.items()}

    @property
    def step_count(self) -> int:
        """How often :meth:`step` has been called, over all resumed runs; a rollback sets it back."""
        return self._progress.step

    @property
    def due(self) -> bool:
        """Whether the next :meth:`step` attempts a reduction (which an adaptive schedule may think better of) or judges one."""
        guard, step = self.guard, self._progress.step + 1
        if guard is not None and guard.probation is not None:
            return step >= guard.probation.until
        return not self._over and (self._progress.waiting or self.schedule.due(step))

    def register(self, **objects: Any) -> None:
        """Name objects that a rollback sets back along with the model: schedulers, scalers, samplers, counters.

        Args:
            objects: each with ``state_dict`` and ``load_state_dict``, or a ``torch.Generator``, or a dict (of counters, say),
                whose content is restored in place.

        Raises:
            ArgumentError: an object of another kind.
        """
        for name, item in objects.items():
            check_registrable(name, item)
        self.registered.update(objects)

    def plan(self) -> ReductionPlan:
        """What an attempt would do now.  Changes nothing.

        Raises:
            NumericalError, DataError: the model or the calibration data do not allow an answer.
        """
        return self._choose(analyse(self.model, self.layers, self.recipe.convention, self.calibration)).plan

    def stability(self) -> Stability:
        """Whether spectra and ranking have settled: what was measured so far, each step compared with the last one.

        The measuring steps are those of the schedule: of ``WhenStable`` all its checks, of ``Watch`` the whole training.
        """
        return self._sightings.stability()

    def step(self) -> ReductionReport | GuardReport | None:
        """Count one optimizer step; reduce if the schedule says so, validate if the guard's recovery window ends.

        Returns:
            what was done: a ReductionReport after an attempt, a GuardReport where the guard refused it or, later, accepted it
            or rolled it back; None if nothing was due.

        Raises:
            CompressmError: the reduction is not possible; model, optimizer and EMA are unchanged.  Or a registered object did
                not take its state back in a rollback; everything else did.
        """
        self.team.ready()
        due = self.due
        self._progress.step += 1
        if self._cadence is not None:
            self._cadence.call()
        guard = self.guard
        probation = None if guard is None else guard.probation
        if probation is not None:
            self._progress.waiting |= self.schedule.due(self._progress.step)
        if not due:
            return None
        with ordinary():
            return self._consider() if guard is None or probation is None else self._validate(guard, probation)

    def _consider(self) -> ReductionReport | GuardReport | None:
        """Attempt a reduction, if an adaptive schedule agrees."""
        started, waiting = time.perf_counter(), self._progress.waiting
        self._progress.waiting = False
        candidates = analyse(self.model, self.layers, self.recipe.convention, self.calibration)
        planned = self._choose(candidates)
        spectra, kept = in_view(candidates, planned)
        self._sightings.add(self._progress.step, candidates, kept)
        if self.schedule.adaptive:
            rate = max((float(g["lr"]) for optimizer in self.optimizers for g in optimizer.param_groups), default=1.0)
            look = Look(self._progress.step, spectra, kept, rate, self._progress.attempts)
            due, self._progress.memory = self.team.decide(self.schedule.decide(look, self._progress.memory))
            if not due and not waiting:
                return None
        return self._attempt(candidates, planned, started)

    def _attempt(self, candidates: Mapping[str, Candidate], planned: Planned, started: float) -> ReductionReport | GuardReport:
        words = ""
        if self.guard is None or not planned.plan.changed:
            planned = self._execute(planned)
        else:
            outcome = self.guard.attempt(
                self._parts(),
                planned,
                progress=asdict(self._progress),
                execute=self._execute,
                gentler=lambda plan: raised(candidates, plan, demands=self.demands, team=self.team),
            )
            if isinstance(outcome, GuardReport):
                self._progress.attempts += 1
                return self._record(outcome)
            planned, words = outcome
        reason = f"{self._progress.next_of(self.schedule.attempts)}, {self._policy_now}, recipe {self.recipe.name}"
        first = planned.plan.changed and not self._progress.reduced
        rates = multiply_rates(self.optimizers, self.registered.values(), self.lr_after if first else None)
        reason = "; ".join(filter(None, [reason, words, rates]))
        report = finish(planned, self._progress.step, reason, started)
        self._progress.add(report)
        self.history.append(report)
        return report

    def _validate(self, guard: Guard, probation: Probation) -> GuardReport:
        def resume(progress: Mapping[str, Any]) -> None:
            self._progress = Progress.of(progress)
            self._progress.attempts += 1
            self._sightings.go_back(self._progress.step)
            self._progress.waiting = not guard.stopped and self.schedule.after(self._progress.step) is None

        more = functools.partial(self.schedule.after, probation.began)
        report, failed = guard.validate(self._parts(), self._progress.step, more, resume)
        self._record(report)
        check_taken_back(failed, report.resumed_at)
        return report

    def _record(self, report: GuardReport) -> GuardReport:
        log.info("%s", report)
        self.history.append(report)
        return report

    def rewrap(self) -> nn.Module:
        """The model to train on: call it after every :meth:`step` of a DistributedDataParallel model.

        Returns:
            the same wrapper as before, or after a reduction a new DistributedDataParallel with the old one's options around
            the same module; the old one raises when it is called.  Other models come back as they are.
        """
        with ordinary():
            return self.team.rewrap()

    def close(self) -> None:
        """Say goodbye at the end of training.

        Raises:
            CompressmError: :meth:`step` was never called.

        Warns:
            ScheduleWarning: training ended before some scheduled reductions.
        """
        if self._cadence is not None:
            self._cadence.close()
            self._cadence = None
        if self._progress.step == 0:
            raise CompressmError(
                f"Compressor.step() was never called, expected one call after every optimizer.step() "
                f"(first reduction due at step {self.schedule.steps[0]}). The model has not been compressed"
            )
        if self.guard is not None:
            self.guard.warn_unvalidated(self._progress.step)
        if not self._over:
            self.schedule.warn_missed(self.step_count, waiting=self._progress.waiting)

    @property
    def _over(self) -> bool:
        """Whether no further reduction will be attempted, whatever is scheduled."""
        return (self.guard is not None and self.guard.stopped) or (self.schedule.adaptive and self._progress.reduced > 0)

    def __enter__(self) -> Compressor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    def state_dict(self) -> dict[str, Any]:
        """State for resuming in mid-schedule: JSON-ready, but for the tensors that a guard has put aside while a reduction is
        on probation (:func:`compressm.save` takes them as well)."""
        return {
            "format": STATE_FORMAT,
            "recipe": self.recipe.name,
            "policy": repr(self.policy),
            "schedule": repr(self.schedule),
            **asdict(self._progress),
            "seen": self._sightings.state_dict(),
            "guard": None if self.guard is None else self.guard.state_dict(),
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
        history = [report_from_dict(report) for report in state["history"]]
        seen = parsed(state.get("seen", []))
        if self.guard is not None:
            self.guard.load(state.get("guard"), self._parts())
        self._progress = Progress.of(state)
        self.history = history
        self._sightings = Sightings(bounded=self.schedule.adaptive, seen=seen)
        if self._cadence is not None:
            self._cadence.restart(self._progress.step)

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ArgumentError unless ``state`` fits this compressor's recipe and layers (ranks may differ)."""
        check_state(state, self.recipe.name, self.layers)
        if (progress := check_guard_state(self.guard, state.get("guard"), self._parts())) is not None:
            check_progress(progress, self.layers)

    def _choose(self, candidates: Mapping[str, Candidate]) -> Planned:
        policy = self._policy_now
        shared = policy.budget if self.recipe.shared_budget else None
        keep = None if shared is None else self._progress.shares(shared, self.schedule.attempts)
        return make_plan(candidates, policy, keep=keep, demands=self.demands, team=self.team)

    def _execute(self, planned: Planned) -> Planned:
        refinement = Refinement(self.refine, self.calibration) if self.refine else None
        options: dict[str, Any] = {"optimizers": self.optimizers, "ema": self.ema, "moments": self.moments, "team": self.team}
        return execute(self.model, planned, **options, refinement=refinement)

    @property
    def _policy_now(self) -> Policy:
        """The policy, gentler with every rollback."""
        failures = 0 if self.guard is None else self.guard.failures
        return functools.reduce(lambda policy, _: policy.gentler(), range(failures), self.policy)

    def _parts(self) -> Parts:
        return Parts(self.model, self.layers, self.optimizers, self.ema, self.registered)

    def _arguments(self) -> list[Any]:
        """What must be the same on all processes that train the model together, JSON-ready."""
        named = [described(self.policy), described(self.schedule), described(self.demands)]
        needs = {name: adapter.needs(module) for name, (module, adapter) in self.layers.items()}
        chosen = [*named, self.recipe.name, self.moments, self.ema is None, self.ranks, needs, self.lr_after]
        return [*chosen, self.calibration.batches is None, self.calibration.sequences, self.guard is None]
