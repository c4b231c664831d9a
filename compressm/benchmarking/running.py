"""Measures families of cases: every contender is judged first, then all are timed in the same rounds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from compressm.benchmarking.cases import Case
from compressm.benchmarking.limits import limit_of
from compressm.benchmarking.problems import Contender, Problem
from compressm.benchmarking.results import Ceilings, Missing, Result
from compressm.benchmarking.timing import Budget, interleaved, one_call, summary

Make = Callable[[Problem], Contender]
Tell = Callable[[str], None]
OURS = "compressm"
WRONG, RAISED = "wrong: ", "raised "  # how reasons for a missing time begin


def built_in(name: str) -> Make:
    """A contender that the package brings along."""
    return lambda problem: problem.built_in[name]()


@dataclass
class Outcome:
    """What became of the contenders of a family; ``samples`` are seconds per call by (group, contender)."""

    results: list[Result] = field(default_factory=list)
    skipped: list[Missing] = field(default_factory=list)
    failed: list[Missing] = field(default_factory=list)
    samples: dict[tuple[str, str], list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Ready:
    """A contender that computed the right answer.

    Attributes:
        estimate: seconds of a warm call.
        error: see :meth:`compressm.benchmarking.problems.Problem.error`.
        peak: bytes, see :func:`compressm.benchmarking.timing.one_call`.
    """

    case: Case
    problem: Problem
    contender: Contender
    estimate: float
    error: float
    peak: int | None


def measure(
    entries: Sequence[tuple[Case, Mapping[str, Make]]], ceilings: Ceilings, budget: Budget, tell: Tell, *, timed: bool = True
) -> Outcome:
    """Judge and time the contenders of some cases together.

    Args:
        entries: every case with makers of its contenders by name.
        ceilings: of the device, for the limits.
        budget: of each contender's samples.
        tell: gets a line per contender.
        timed: False stops behind the judgement.
    """
    outcome, ready = Outcome(), {}
    gc.freeze()  # the imported libraries hold half a million objects, which every collection would look at
    try:
        for case, makers in entries:
            problem = case.build()
            for name, make in makers.items():
                found = _judge(case, problem, name, make, budget, outcome, tell)
                if found is not None:
                    ready[case.group, name] = found
            problem.oracle.clear()
        if timed:
            _time(ready, ceilings, budget, outcome)
    finally:
        gc.unfreeze()
    ready.clear()
    _release()
    return outcome


def _release() -> None:
    """Give memory back that nothing refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _judge(
    case: Case, problem: Problem, name: str, make: Make, budget: Budget, outcome: Outcome, tell: Tell
) -> Ready | None:
    """The contender, ready to be timed; None with an entry in ``outcome`` where it is wrong, raises or takes too long."""
    started = time.perf_counter()
    try:
        contender = make(problem)
        error = problem.error(contender.answers())
        if not error <= problem.tolerance:
            reason = f"{WRONG}relative error {error:.1e} against the float64 reference, allowed {problem.tolerance:.0e}"
            outcome.failed.append(Missing(group=case.group, contender=name, reason=reason))
            tell(f"{case.group} | {name}: {reason}")
            return None
        estimate, peak = one_call(contender.timed, case.device, warm=contender.warms)
        if estimate > budget.longest:
            reason = f"one call takes {estimate:.0f} s, more than the {budget.longest:.0f} s that a run waits"
            outcome.skipped.append(Missing(group=case.group, contender=name, reason=reason))
            tell(f"{case.group} | {name}: {reason}")
            return None
    except Exception as raised:
        outcome.failed.append(_raised(case, name, raised))
        _release()
        tell(f"{case.group} | {name}: {outcome.failed[-1].reason}")
        return None
    prepared = time.perf_counter() - started
    tell(f"{case.group} | {name}: error {error:.0e}, about {estimate * 1e3:.3g} ms (ready after {prepared:.1f} s)")
    return Ready(case, problem, contender, estimate, error, peak)


def _raised(case: Case, name: str, error: Exception) -> Missing:
    text = next(iter(str(error).strip().splitlines()), "")
    return Missing(group=case.group, contender=name, reason=f"{RAISED}{type(error).__name__}: {text[:200]}")


def _time(ready: Mapping[tuple[str, str], Ready], ceilings: Ceilings, budget: Budget, outcome: Outcome) -> None:
    if not ready:
        return
    device = next(iter(ready.values())).case.device
    samples = interleaved(
        {key: r.contender.timed for key, r in ready.items()}, {key: r.estimate for key, r in ready.items()}, budget, device
    )
    for key, r in ready.items():
        taken, case = samples[key], r.case
        if isinstance(taken, Exception):
            outcome.failed.append(_raised(case, key[1], taken))
            continue
        outcome.samples[key] = taken
        limit, by = limit_of(r.problem.counts, ceilings)
        outcome.results.append(
            Result(
                group=case.group, op=case.op, level=case.level, shape=case.shape, dtype=case.dtype, passes=case.passes,
                contender=key[1], milliseconds=summary(taken), peak_bytes=r.peak, error=r.error, counts=r.problem.counts,
                limit_ms=limit, limit_by=by,
            )
        )  # fmt: skip
