"""The numbers that table, summary and pictures share: every run beside the one of full size."""

from __future__ import annotations

from dataclasses import dataclass

from compressm.experiments.reports.data import Report, Run


@dataclass(frozen=True)
class Row:
    """One line of the comparison table; None where the report does not say.

    Attributes:
        name, title: of the run.
        score: the report's metric on the test set.
        gap: score minus that of the full-size run; None for that run itself.
        states: per layer.
        parameters: of the final model.
        step_seconds: median seconds per training step of the final model.
        step_spread: its 20 % and 80 % quantiles.
        interleaved: whether step_seconds were measured in turn with the other models, or else while the run trained.
        speed: step time of the full-size run over this one's, both measured the same way.
        seconds_training: all steps and reductions, without evaluations.
        seconds_total: everything.
    """

    name: str
    title: str
    score: float | None
    gap: float | None
    states: tuple[int, ...]
    parameters: int | None
    step_seconds: float | None
    step_spread: tuple[float, float] | None
    interleaved: bool
    speed: float | None
    seconds_training: float | None
    seconds_total: float | None


def rows(report: Report) -> list[Row]:
    """The comparison table, in the report's order of runs."""
    return [_row(report, run, report.reference) for run in report.runs]


def _row(report: Report, run: Run, reference: Run | None) -> Row:
    final, measured = run.final, report.step_time(run)
    score, gap = report.score(final), None
    theirs = None if reference is None or run is reference else report.score(reference.final)
    if score is not None and theirs is not None:
        gap = score - theirs
    spread = None
    if measured is not None and measured.p20 is not None and measured.p80 is not None:
        spread = measured.p20, measured.p80
    return Row(
        name=run.name,
        title=run.label,
        score=score,
        gap=gap,
        states=run.final_states,
        parameters=run.parameters,
        step_seconds=final.seconds_per_step if measured is None else measured.median,
        step_spread=spread,
        interleaved=measured is not None,
        speed=_speed(report, run, reference),
        seconds_training=final.seconds_training,
        seconds_total=final.seconds_total,
    )


def _speed(report: Report, run: Run, reference: Run | None) -> float | None:
    """Reference's step time over the run's: interleaved if both were measured so, else from the runs themselves."""
    if reference is None:
        return None
    in_turn = report.step_time(run), report.step_time(reference)
    ours, theirs = run.final.seconds_per_step, reference.final.seconds_per_step
    if in_turn[0] is not None and in_turn[1] is not None:
        ours, theirs = in_turn[0].median, in_turn[1].median
    return theirs / ours if ours and theirs else None
