"""What the guard decides: which reductions stay, which are undone, and what is tried then."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from compression.guard_cases import Script, same
from torch import nn

import compressm
from compressm.compression import GuardReport, ReductionReport, ScheduleWarning
from compressm.errors import ArgumentError


def test_an_accepted_reduction_is_left_alone(whole):
    one = whole(ema="module")
    one.step()
    other = copy.deepcopy(one)
    guarded = one.guarded(compressm.Rollback(Script(1.0, 1.05, 1.004), recovery=2))
    plain = other.guarded(None)
    for part, compressor in ((one, guarded), (other, plain)):
        torch.manual_seed(4)
        part.reports = part.steps(compressor, 7)
    assert [type(report).__name__ for report in one.reports if report] == ["ReductionReport", "GuardReport"]
    assert one.reports[4].outcome == "accepted"
    assert not one.reports[4].changed
    assert guarded.step_count == plain.step_count == 7
    left, right = one.state(), other.state()
    for part in left.keys() - {"random"}:
        assert same(left[part], right[part]), part
    assert guarded.state_dict()["guard"]["probation"] is None


def test_ranks_are_raised_until_the_cut_is_harmless(whole):
    """Right after the cut 3/3 and 6/5 states are refused; 7/6 is what a plain reduction to it gives, bit for bit."""
    one = whole()
    quick = Script(1.0, 1.2, 1.11, 1.1)
    compressor = one.guarded(compressm.Rollback(Script(9.0), recovery=2, quick=quick))
    one.steps(compressor, 2)
    one.step()
    other = copy.deepcopy(one)
    report = compressor.step()
    assert report.ranks == {"lrus.0": 7, "lrus.1": 6}
    assert "1 before the cut, right after it 1.2 with 3/3 states, 1.11 with 6/5 states, 1.1 with 7/6 states" in report.reason
    compressm.compress(other.model, compressm.FixedRank(report.ranks), optimizer=other.optimizer)
    left, right = one.state(), other.state()
    assert same(left["model"], right["model"])
    assert same(left["optimizer"], right["optimizer"])


@pytest.mark.parametrize(("options", "ranks"), [({"multiple_of": 3}, (9, 6)), ({"uniform": True}, (7, 7))])
def test_raised_ranks_obey_multiples_and_uniformity(whole, options, ranks):
    one = whole(ranks=(10, 7))
    policy = compressm.Shrink(0.7, gate=1.0)
    compressor = one.guarded(compressm.Rollback(Script(1.0, 2.0, 1.0)), policy, **options)
    report = one.steps(compressor, 3)[-1]
    assert tuple(report.ranks.values()) == ranks


def test_less_is_tried_after_a_failure_and_then_nothing(whole):
    """No attempt is left: the gentler one comes with the next step.  The bar is the best value before any reduction."""
    one = whole()
    metric = Script(1.0, 1.0, 1.1, 0.9, 0.9, 0.95)
    schedule = compressm.Once(100, at=0.03)
    compressor = one.guarded(compressm.Rollback(metric, recovery=1, jump=None), compressm.Energy(tau=0.4, gate=1.0), schedule)
    metric.values = [1.0, 1.1, 0.9, 0.95]
    reports = one.steps(compressor, 12)
    kinds = [report and getattr(report, "outcome", "reduced") for report in reports]
    assert kinds == [None, None, "reduced", "rolled back", "reduced", "rolled back"] + [None] * 6
    taus = [report.reason.split("tau=")[1].split(",")[0] for report in reports if isinstance(report, ReductionReport)]
    assert taus == ["0.4", "0.2"]
    assert sum(reports[2].ranks.values()) < sum(reports[4].ranks.values())
    assert [report.reference for report in reports if isinstance(report, GuardReport)] == [1.0, 0.9]
    assert "failure 1 of 2, a gentler attempt at the next step" in reports[3].reason
    assert "no further attempt" in reports[5].reason
    assert compressor.ranks == {"lrus.0": 8, "lrus.1": 6}
    assert compressor.history == [report for report in reports if report]
    compressor.close()


def test_a_scheduled_attempt_is_waited_for(whole):
    one = whole()
    metric = Script(1.0, 5.0, 1.0, 1.0)
    schedule = compressm.At([2, 6], total_steps=100)
    compressor = one.guarded(compressm.Rollback(metric, recovery=1, jump=None), compressm.FixedRank(2), schedule)
    reports = one.steps(compressor, 9)
    kinds = [report and getattr(report, "outcome", "reduced") for report in reports]
    assert kinds == [None, "reduced", "rolled back"] + [None] * 3 + ["reduced", "accepted", None]
    assert compressor.step_count == 8
    assert reports[6].ranks == {"lrus.0": 5, "lrus.1": 4}
    assert "HalfWay(policy=FixedRank(states=2))" in reports[6].reason
    assert "a gentler attempt at step 6 at the earliest" in reports[2].reason


def test_the_bar_is_never_lowered(whole):
    """Each reduction costs 0.4 %: the second is beyond 0.5 % of what was there before the first, so is the last one."""
    one = whole(ranks=(20, 20))
    metric = Script(1.0, 1.004, 1.004, 1.008)
    schedule = compressm.At([2, 5], total_steps=100)
    compressor = one.guarded(compressm.Rollback(metric, recovery=1, jump=None), compressm.Shrink(0.2), schedule)
    outcomes = [report.outcome for report in one.steps(compressor, 6) if isinstance(report, GuardReport)]
    assert outcomes == ["accepted", "rolled back"]
    assert compressor.ranks == {"lrus.0": 16, "lrus.1": 16}


@pytest.mark.parametrize(
    ("mode", "values", "outcome"),
    [
        ("min", (1.0, 1.005), "accepted"),
        ("min", (1.0, 1.0051), "rolled back"),
        ("min", (-1.0, -0.996), "accepted"),
        ("min", (-1.0, -0.99), "rolled back"),
        ("max", (0.8, 0.797), "accepted"),
        ("max", (0.8, 0.79), "rolled back"),
        ("max", (0.8, 0.9), "accepted"),
        ("min", (1.0, float("nan")), "rolled back"),
        ("max", (1.0, float("inf")), "rolled back"),
    ],
)
def test_tolerance(whole, mode, values, outcome):
    one = whole()
    compressor = one.guarded(compressm.Rollback(Script(*values), mode=mode, recovery=1, jump=None))
    report = one.steps(compressor, 4)[-1]
    assert report.outcome == outcome
    again = GuardReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False)))
    assert again.to_dict() == report.to_dict()


def test_an_attempt_that_comes_due_on_probation_waits(whole):
    one = whole(ranks=(20, 20))
    schedule = compressm.Every(1, 2, 4, total_steps=100)
    compressor = one.guarded(compressm.Rollback(Script(1.0), recovery=3), compressm.Shrink(0.2), schedule)
    reports = one.steps(compressor, 12)
    kinds = [report and getattr(report, "outcome", "reduced") for report in reports]
    assert kinds == [None, "reduced", None, None, "accepted", "reduced", None, None, "accepted", None, None, None]


def test_a_scheduler_that_would_run_ahead_is_noticed(whole):
    one = whole()
    compressor = compressm.Compressor(
        one.model, one.optimizer, policy=compressm.FixedRank(3), schedule=compressm.At([2, 4], total_steps=50),
        guard=compressm.Rollback(Script(1.0), recovery=1),
    )  # fmt: skip
    one.steps(compressor, 1)
    with pytest.warns(ScheduleWarning, match=r"learning-rate scheduler drives the AdamW optimizer.*register"):
        one.steps(compressor, 1)
    one.steps(compressor, 3)


def test_pragmatic_mode_stops_at_the_first_drop(whole):
    one = whole(ranks=(20, 20))
    metric = Script(1.0, 0.9, 0.9, 0.95, 0.9, 1.01)
    schedule = compressm.Every(2, 2, 20, total_steps=100)
    compressor = one.guarded(compressm.Rollback.pragmatic(metric, recovery=1), compressm.Shrink(0.1), schedule)
    outcomes = [report.outcome for report in one.steps(compressor, 20) if isinstance(report, GuardReport)]
    assert outcomes == ["accepted", "accepted", "rolled back"]
    assert compressor.ranks == {"lrus.0": 17, "lrus.1": 17}


def test_an_end_on_probation_is_not_silent(whole):
    one = whole()
    compressor = one.guarded(compressm.Rollback(Script(1.0), recovery=4))
    one.steps(compressor, 4)
    with pytest.warns(ScheduleWarning, match="reduction of step 3 would only have been validated at step 7"):
        compressor.close()


def test_a_real_run_keeps_good_cuts_and_undoes_bad_ones(training):
    """The validation loss of a sequence task decides: one state is too few for two frequencies, twelve are enough."""
    t = torch.arange(40, dtype=torch.float64)
    classes = torch.arange(3).repeat(16)
    waves = torch.sin((0.2 + 0.3 * classes[:, None]) * t + 6 * torch.rand(48, 1, dtype=torch.float64))
    x = torch.stack([waves, waves.roll(1, 1)], -1)

    def loss_of(model):
        return nn.functional.cross_entropy(model(x), classes)

    def train(policy, **options):
        torch.manual_seed(2)
        run = training(torch.optim.Adam, ranks=(16, 16), steps=0, lr=1e-2)
        guard = compressm.Rollback(loss_of, failures=1, recovery=2, **options)
        schedule = compressm.Once(60, at=0.8)
        compressor = compressm.Compressor(
            run.model, run.optimizer, policy=policy, schedule=schedule, calibration=[x], guard=guard
        )
        while compressor.step_count < 60:
            run.model.train()
            run.optimizer.zero_grad()
            loss_of(run.model).backward()
            run.optimizer.step()
            compressor.step()
        return compressor.history

    reduced, verdict = train(compressm.FixedRank(12))
    assert verdict.outcome == "accepted"
    assert verdict.ranks == reduced.ranks == {"lrus.0": 12, "lrus.1": 12}
    (refused,) = train(compressm.FixedRank(1), tries=0)
    assert refused.outcome == "refused"
    reduced, verdict = train(compressm.FixedRank(1), jump=None)
    assert verdict.outcome == "rolled back"
    assert verdict.ranks == {"lrus.0": 16, "lrus.1": 16}


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: compressm.Rollback(5), "evaluate: expected a function"),
        (lambda: compressm.Rollback(len, quick=3), "quick: expected a function"),
        (lambda: compressm.Rollback(len, mode="up"), 'mode: expected "min" or "max"'),
        (lambda: compressm.Rollback(len, -0.1), "tolerance: expected a number, at least 0"),
        (lambda: compressm.Rollback(len, float("nan")), "tolerance"),
        (lambda: compressm.Rollback(len, jump="big"), "jump"),
        (lambda: compressm.Rollback(len, recovery=0), "recovery: expected a fraction"),
        (lambda: compressm.Rollback(len, recovery=1.0), "recovery"),
        (lambda: compressm.Rollback(len, tries=-1), "tries: expected an integer, at least 0"),
        (lambda: compressm.Rollback(len, failures=0), "failures"),
        (lambda: compressm.Rollback(len, disk_bytes=1.5), "disk_bytes"),
    ],
)
def test_out_of_range(build, match):
    with pytest.raises(ArgumentError, match=match):
        build()


def test_the_recovery_window(training):
    run = training()

    def guarded(guard, schedule):
        return compressm.Compressor(
            run.model, run.optimizer, policy=compressm.FixedRank(3), schedule=schedule, guard=guard
        ).guard.window

    assert guarded(compressm.Rollback(len), compressm.Once(1000)) == 10
    assert guarded(compressm.Rollback(len), compressm.Once(10)) == 1
    assert guarded(compressm.Rollback(len, recovery=7), compressm.At([5])) == 7
    with pytest.raises(ArgumentError, match=r"recovery: expected a number of steps, got 0\.01.*Pass total_steps"):
        guarded(compressm.Rollback(len), compressm.At([5]))
    with pytest.raises(ArgumentError, match="expected an end before total_steps = 10, got 3 steps after the last attempt"):
        guarded(compressm.Rollback(len, recovery=3), compressm.Once(10, at=0.8))
    with pytest.raises(ArgumentError, match="guard: expected a Rollback instance"):
        guarded(len, compressm.Once(10))
