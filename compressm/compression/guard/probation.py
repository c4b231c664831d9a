"""The guard: watches every reduction, and undoes those that cost too much."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compressm.compression.common.types import is_number
from compressm.compression.common.undisturbed import undisturbed
from compressm.compression.distributed.team import Team
from compressm.compression.guard.rollback import Metric, Rollback
from compressm.compression.guard.snapshot import Parts, Snapshot, check
from compressm.compression.planning.plans import Planned
from compressm.compression.planning.report import GuardReport
from compressm.compression.planning.schedules import Schedule, ScheduleWarning
from compressm.compression.surgery.audit import Optimizers
from compressm.compression.surgery.optimizer_state import masters_of
from compressm.compression.surgery.references import References
from compressm.errors import CompressmError, NumericalError, bad_argument


@dataclass
class Probation:
    """A reduction that is not validated yet."""

    began: int
    until: int
    snapshot: Snapshot


class Guard:
    """A Rollback at work in one Compressor.

    Attributes:
        best: the best value of ``evaluate`` before any reduction that the guard watched, or None.
        unwatched: how many reductions were in force before those, made by a run without a guard.
        failures: rollbacks so far.
        probation: the reduction that waits for its validation, or None.

    Raises:
        ModelError: the model is sharded over several processes.
        ArgumentError: the rule does not fit the schedule, or an optimizer trains attached master copies.
    """

    def __init__(self, rule: Rollback, schedule: Schedule, team: Team, optimizers: Optimizers) -> None:
        if masters_of(optimizers):
            remedy = "Use float32 parameters with autocast, or an optimizer that keeps the copies in its state"
            raise bad_argument("guard", got="a Rollback with attached master copies", expected="None", remedy=remedy)
        team.check_guard()
        self.team = team
        self.rule, self.window = rule, rule.window(schedule)
        self.best: float | None = None
        self.unwatched = 0
        self.failures = 0
        self.probation: Probation | None = None
        self._warned = False

    @property
    def stopped(self) -> bool:
        """Whether no further reduction is attempted."""
        return self.failures >= self.rule.failures

    def attempt(
        self,
        parts: Parts,
        planned: Planned,
        *,
        progress: Mapping[str, Any],
        execute: Callable[[Planned], Planned],
        gentler: Callable[[Planned], Planned | None],
    ) -> tuple[Planned, str] | GuardReport:
        """Carry a plan out, or a gentler one, if the metric allows it.

        Args:
            parts: what to put aside.
            planned: what to do.
            progress: of the Compressor; ``step``, and ``reduced`` for how many reductions are in force.
            execute: carries a plan out and returns it as it was carried out, or raises and changes nothing.
            gentler: the plan with ranks half-way to the present ones, or None where there are none.

        Returns:
            the plan that was carried out and words about it, or a report that none was; then nothing has changed.

        Raises:
            NumericalError: the metric is not finite before the reduction; nothing has changed.
        """
        self._warn_unregistered(parts)
        started, rule, step = time.perf_counter(), self.rule, progress["step"]
        reference = self._reference(parts, progress["reduced"])
        snapshot = Snapshot.take(parts, progress, rule.disk_bytes, rule.folder)
        probation = Probation(step, step + self.window, snapshot)
        done, value, tried = self._try(parts, planned, probation, reference, execute, gentler)
        words = "" if rule.jump is None else f"metric {reference:.5g} before the cut, right after it {', '.join(tried)}"
        if done is not None:
            return done, words
        words += f", allowed is {rule.jump:g} worse"
        return GuardReport(step, time.perf_counter() - started, "refused", words, parts.ranks, value, reference, step)

    def _reference(self, parts: Parts, reduced: int) -> float:
        """What the metric right after a cut is compared with; ``best`` hears of it too before the first cut that is watched.

        Args:
            reduced: how many reductions are in force.
        """
        rule = self.rule
        before = self._measure(parts, rule.evaluate, "evaluate")
        reference = before if rule.quick is None or rule.jump is None else self._measure(parts, rule.quick, "quick")
        for value in (before, reference):
            if not math.isfinite(value):
                raise NumericalError(
                    f"guard: the metric is {value} before the reduction, expected a finite number to compare with. Has "
                    "training diverged?"
                )
        if self.best is None:
            self.best, self.unwatched = before, reduced
        elif reduced == self.unwatched:
            self.best = rule.better(self.best, before)
        return reference

    def _try(
        self,
        parts: Parts,
        planned: Planned | None,
        probation: Probation,
        reference: float,
        execute: Callable[[Planned], Planned],
        gentler: Callable[[Planned], Planned | None],
    ) -> tuple[Planned | None, float, list[str]]:
        """Cut by a plan, then by gentler ones, until the metric allows it.

        Nothing trains in between: what is undone here are references, and every parameter is the same object as before.

        Returns:
            the plan that is in force, its probation begun, or None with everything put back and the snapshot closed; the last
            value of the metric; words on every cut.
        """
        rule, tried = self.rule, list[str]()
        quick, name = (rule.evaluate, "evaluate") if rule.quick is None else (rule.quick, "quick")
        before = References(parts.layers, parts.optimizers, parts.ema)
        value = reference
        try:
            while planned is not None and len(tried) <= rule.tries:
                planned = execute(planned)
                value = reference if rule.jump is None else self._measure(parts, quick, name)
                tried.append(f"{value:.5g} with {'/'.join(map(str, planned.plan.ranks.values()))} states")
                if rule.jump is None or rule.passes(value, reference, rule.jump):
                    self.probation = probation
                    return planned, value, tried
                before.restore()
                self.team.reinstated()
                planned = gentler(planned)
        except BaseException:
            self.probation = None
            before.restore()
            self.team.reinstated()
            raise
        finally:
            if self.probation is None:
                probation.snapshot.close()
        return None, value, tried

    def validate(
        self, parts: Parts, step: int, more: Callable[[], int | None], resume: Callable[[Any], None]
    ) -> tuple[GuardReport, dict[str, Exception]]:
        """Judge the reduction on probation; puts everything back if it fails.

        An interruption on the way back, Ctrl-C say, is raised when everything is back.

        Args:
            parts: as in :meth:`attempt`.
            step: of the Compressor now.
            more: the next scheduled attempt after the step of the reduction, or None.
            resume: puts the Compressor's progress of then back; may be called twice.

        Returns:
            the report, and what did not take its state back (a registered object, say), with its error.
        """
        started = time.perf_counter()
        probation, best, rule = self.probation, self.best, self.rule
        assert probation is not None
        assert best is not None  # measured in front of every reduction
        value = self._measure(parts, rule.evaluate, "evaluate")
        passed = rule.passes(value, best, rule.tolerance)
        worse = f"{rule.tolerance:g} worse than {best:.5g}, the best before " + (
            f"the first reduction that the guard watched (after {self.unwatched} that it did not)"
            if self.unwatched
            else "any reduction"
        )
        failed: dict[str, Exception] = {}
        if passed:
            reason = f"metric {value:.5g} {self.window} steps after the reduction, allowed is {worse}"
            self.probation, resumed = None, step
        else:
            following = more()
            failed = self._go_back(parts, probation, resume)
            resumed = probation.began
            then = "at the next step" if following is None else f"at step {following} at the earliest"
            but = "".join(f" but for {what} ({type(error).__name__}: {error})" for what, error in failed.items())
            reason = (
                f"metric {value:.5g} {self.window} steps after the reduction, more than {worse}; everything{but} is as it was "
                f"at step {resumed}, failure {self.failures} of {rule.failures}, "
                + ("no further attempt" if self.stopped else f"a gentler attempt {then}")
            )
        probation.snapshot.close()
        outcome = "accepted" if passed else "rolled back"
        seconds = time.perf_counter() - started
        return GuardReport(step, seconds, outcome, reason, parts.ranks, value, best, resumed), failed

    def _go_back(self, parts: Parts, probation: Probation, resume: Callable[[Any], None]) -> dict[str, Exception]:
        """Put everything back as it was before a reduction, the Compressor's counts included, whatever comes in between."""
        failures = self.failures + 1

        def go() -> dict[str, Exception]:
            failed = probation.snapshot.restore(parts)
            self.team.replaced()
            self.failures, self.probation = failures, None
            resume(probation.snapshot.progress)
            return failed

        try:
            return go()
        except Exception:  # nothing has changed
            raise
        except BaseException:
            go()
            raise

    def warn_unvalidated(self, step: int) -> None:
        """Warn, in the name of the caller's caller, if training ends at a step with a reduction on probation."""
        if (now := self.probation) is not None:
            warnings.warn(
                f"training ended at step {step}, but the reduction of step {now.began} would only have been validated at "
                f"step {now.until}; shorten the guard's recovery, or train while compressor.step_count < total_steps",
                ScheduleWarning,
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """A JSON tree; with a reduction on probation it holds the tensors that were put aside as well."""
        probation = None
        if (now := self.probation) is not None:
            probation = {"began": now.began, "until": now.until, "snapshot": now.snapshot.state_dict()}
        return {"best": self.best, "unwatched": self.unwatched, "failures": self.failures, "probation": probation}

    def check(self, state: Any, parts: Parts) -> Any:
        """Raise ArgumentError unless ``state`` came from :meth:`state_dict` of a guard of this model.

        Returns:
            the Compressor's progress that a rollback would go back to, or None.
        """
        fine = isinstance(state, Mapping) and {"best", "failures", "probation"} <= state.keys()
        fine = fine and is_number(state["failures"]) and (state["best"] is None or is_number(state["best"]))
        fine = fine and is_number(state.get("unwatched", 0)) and (state["probation"] is None or state["best"] is not None)
        probation = state["probation"] if fine else None
        if fine and probation is not None:
            fine = isinstance(probation, Mapping) and is_number(probation.get("began")) and is_number(probation.get("until"))
        if not fine:
            raise bad_argument("state_dict guard", got=repr(state)[:80], expected="what Compressor.state_dict() returned")
        if probation is None:
            return None
        check(probation.get("snapshot"), parts)
        return probation["snapshot"]["progress"]

    def load(self, state: Mapping[str, Any] | None, parts: Parts) -> None:
        """Go on from a checked :meth:`state_dict`, or from a run that had no guard; if that fails, nothing has changed.

        A reduction that was on probation here is forgotten; its snapshot goes when nobody holds it any more, so that whoever
        called can still undo this.
        """
        best, unwatched, failures, probation = None, 0, 0, None
        if state is not None:
            best, failures, unwatched = state["best"], int(state["failures"]), int(state.get("unwatched", 0))
        if state is not None and (saved := state["probation"]) is not None:
            snapshot = Snapshot.from_state_dict(saved["snapshot"], parts, self.rule.disk_bytes, self.rule.folder)
            probation = Probation(int(saved["began"]), int(saved["until"]), snapshot)
        self.best, self.unwatched, self.failures, self.probation = best, unwatched, failures, probation

    def _measure(self, parts: Parts, metric: Metric, name: str) -> float:
        with self.team.together(f"the guard's {name}"):
            with undisturbed(parts.model, [module for module, _ in parts.layers.values()]), torch.no_grad():
                value = metric(parts.model)
            try:
                number = float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise bad_argument(name, got=f"a function that returned {type(value).__name__}", expected="a number") from error
        return self.team.decide(number)

    def _warn_unregistered(self, parts: Parts) -> None:
        """A scheduler that goes on after a rollback as if nothing had happened would fit the step count no more."""
        known = {id(getattr(item, "optimizer", None)) for item in parts.registered.values()}
        driven = [o for o in parts.optimizers if getattr(o.step, "_wrapped_by_lr_sched", False) and id(o) not in known]
        if driven and not self._warned:
            self._warned = True
            warnings.warn(
                f"a learning-rate scheduler drives the {type(driven[0]).__name__} optimizer, but a rollback would not set it "
                "back. Pass it to compressor.register(scheduler=scheduler)",
                ScheduleWarning,
                stacklevel=5,
            )


def check_guard_state(guard: Guard | None, state: Any, parts: Parts) -> Any:
    """Raise ArgumentError unless a Compressor with this guard, or none, can go on from the state of a guard, or of none.

    Returns:
        the Compressor's progress that a rollback would go back to, or None.
    """
    if guard is not None and state is not None:
        return guard.check(state, parts)
    if state is not None and state["probation"] is not None:
        remedy = "Pass guard=Rollback(...), as in the saved run"
        raise bad_argument("guard", got=None, expected="a Rollback to validate the last reduction", remedy=remedy)
    return None


def check_taken_back(failed: Mapping[str, Exception], step: int) -> None:
    """Raise CompressmError if a registered object refused its state of a step when everything went back to there."""
    for what, error in failed.items():
        raise CompressmError(
            f"guard: {what} did not take back its state of step {step} ({type(error).__name__}: {error}), expected its "
            "load_state_dict() to take what its state_dict() had returned. Everything else is back, step_count included: see "
            "compressor.history[-1]; set this one back by hand"
        ) from error
