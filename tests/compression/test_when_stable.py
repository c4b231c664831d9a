"""A reduction as soon as the spectrum has settled."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import compressm
from compressm.compression.planning import schedules
from compressm.compression.planning.calibration import collect
from compressm.control import balance
from compressm.errors import ArgumentError


def look(step, spectrum=(1.0, 0.5, 0.1), kept=tuple(range(20)), lr=1.0, attempts=0):
    return schedules.Look(step, {"a": (2.0, 1.0), "b": spectrum}, {"a": (0,), "b": kept}, lr, attempts)


def decisions(schedule, looks):
    """What a schedule decides on a sequence of looks, its memory kept as JSON in between."""
    memory, found = None, []
    for item in looks:
        due, memory = schedule.decide(item, json.loads(json.dumps(memory)))
        found.append(due)
    return found


def test_checks_and_the_forced_one():
    schedule = compressm.WhenStable(1000)
    assert schedule.steps == tuple(range(25, 501, 25))
    assert (schedule.attempts, schedule.total_steps) == (1, 1000)
    assert [step for step in range(1001) if schedule.due(step)] == list(schedule.steps)
    warm = compressm.WhenStable(1000, warmup=0.1, check=0.03, until=0.4)
    assert warm.steps == (130, 160, 190, 220, 250, 280, 300, 310, 340, 370, 400)
    assert eval(repr(warm), {"WhenStable": compressm.WhenStable}) == warm
    assert compressm.WhenStable(40, check=0.1, force=0.5).steps == (4, 8, 12, 16, 20)


def test_fires_at_the_second_quiet_check_in_a_row():
    schedule = compressm.WhenStable(1000)
    assert decisions(schedule, [look(25), look(50), look(75), look(100)]) == [False, False, True, True]
    moved = (1.0, 0.5, 0.16)
    assert decisions(schedule, [look(25), look(50), look(75, moved), look(100, moved), look(125, moved)]) == [
        False, False, False, False, True,
    ]  # fmt: skip
    assert decisions(schedule, [look(25), look(50, (1.0, 0.5, 0.1499)), look(75)]) == [False, False, True]


def test_the_kept_states_must_have_settled():
    schedule = compressm.WhenStable(1000)
    one, two = (*range(19), 25), (*range(18), 25, 26)
    assert decisions(schedule, [look(25), look(50, kept=one), look(75)]) == [False, False, True]  # 5 % exchanged
    assert decisions(schedule, [look(25), look(50, kept=two), look(75, kept=two)]) == [False, False, False]  # 10 %
    assert decisions(schedule, [look(25), look(50, kept=range(17)), look(75, kept=range(17))]) == [False, False, False]


def test_a_layer_that_moves_holds_the_others_back():
    schedule = compressm.WhenStable(1000)
    looks = [look(25), look(50), look(75)]
    looks[1].spectra["a"] = (2.0, 1.11)
    assert decisions(schedule, looks) == [False, False, False]


def test_a_rising_learning_rate_never_counts():
    """Nothing moves while it is small; afterwards drift is scaled to its peak."""
    schedule = compressm.WhenStable(1000)
    rates = (0.1, 0.2, 0.3, 1.0, 1.0, 1.0)
    assert decisions(schedule, [look(25 * i, lr=lr) for i, lr in enumerate(rates, 1)]) == [False] * 5 + [True]
    slow = [look(25, lr=1.0)] + [look(25 * i, (1.0, 0.5, 0.1 + 0.02 * i), lr=0.25) for i in (2, 3, 4)]
    assert decisions(schedule, slow) == [False] * 4
    fast = [look(item.step, item.spectra["b"], lr=1.0) for item in slow]
    assert decisions(schedule, fast) == [False, False, True, True]
    assert decisions(schedule, [look(25, lr=0.0), look(50, lr=0.0), look(75, lr=0.0)])[-1]


def test_forced_once():
    schedule = compressm.WhenStable(1000)
    wild = [look(step, (1.0, 0.5, 0.1 * (i % 2)), attempts=int(step > 300)) for i, step in enumerate(schedule.steps)]
    assert [w.step for w, due in zip(wild, decisions(schedule, wild), strict=True) if due] == [300]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"total_steps": 0}, "total_steps"),
        ({"check": 0}, "check"),
        ({"patience": 0}, "patience"),
        ({"warmup": -0.1}, r"warmup: expected a number in \[0, 1\)"),
        ({"warmup": 0.4}, "force: expected more than warmup = 0.4 and at most until = 0.5, got 0.3"),
        ({"force": 0.6}, "force"),
        ({"warmup": 0.29}, "check: expected more than patience = 2 checks between warmup and force .step 300., got 0 checks"),
        ({"check": 0.2}, "got 1 checks"),
        ({"total_steps": 3}, "check"),
        ({"drift": 2}, "drift"),
    ],
)
def test_out_of_range(options, match):
    with pytest.raises(ArgumentError, match=match):
        compressm.WhenStable(**{"total_steps": 1000, **options})


def test_the_states_that_a_balanced_cut_keeps():
    """A system whose last states do nothing: the others are kept, in both conventions."""
    lam = torch.polar(torch.linspace(0.5, 0.9, 6, dtype=torch.float64), torch.linspace(0.3, 2.5, 6, dtype=torch.float64))
    B = torch.randn(6, 3, dtype=torch.complex128)
    B[[1, 4]] *= 1e-6
    C = torch.randn(2, 6, dtype=torch.complex128)
    system = compressm.DiagonalSystem.from_lam(lam, B, C)
    for convention in ("real", "complex"):
        reduction = balance(system, convention=convention).reduce(4)
        assert reduction.kept(6).tolist() == [0, 2, 3, 5]


class Waves:
    """Three frequencies to tell apart, and a warm-up of 20 steps."""

    def __init__(self, training, lr):
        t = torch.arange(30, dtype=torch.float64)
        self.classes = torch.arange(3).repeat(8)
        waves = torch.sin((0.2 + 0.3 * self.classes[:, None]) * t + 6 * torch.rand(24, 1, dtype=torch.float64))
        self.x = torch.stack([waves, waves.roll(1, 1)], -1)
        run = training(torch.optim.Adam, ranks=(12,), steps=0, lr=lr)
        self.model, self.optimizer = run.model, run.optimizer
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: min(1.0, (step + 1) / 20))

    def train(self, steps, schedule, calibrated=False):
        """Until a reduction is made, or so many steps."""
        compressor = compressm.Compressor(
            self.model, self.optimizer, policy=compressm.Energy(tau=0.1), schedule=schedule,
            calibration=[self.x] if calibrated else None,
        )  # fmt: skip
        for _ in range(steps):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model.eval()(self.x), self.classes).backward()
            self.optimizer.step()
            self.scheduler.step()
            if (report := compressor.step()) is not None:
                return report
        return None


@pytest.mark.parametrize("calibrated", [False, True])
def test_fires_in_training(training, calibrated):
    """A real run: the reduction comes once the spectrum has settled, well before it would be forced."""
    schedule = compressm.WhenStable(200, until=0.9, force=0.9, change=0.35)
    report = Waves(training, 1e-2).train(200, schedule, calibrated)
    assert report.changed
    assert 30 <= report.step < 180
    assert report.step in schedule.steps
    assert report.layers[0].gramians == ("data" if calibrated else "data-free")


def test_a_warm_up_does_not_trigger(training):
    """In the same kind of run the spectrum hardly moves at first, which alone would look settled."""
    looks = []

    class Listening(compressm.WhenStable):
        def decide(self, look, memory):
            looks.append(look)
            return super().decide(look, memory)

    schedule = Listening(200)
    assert Waves(training, 5e-4).train(20, schedule) is None
    assert len(looks) == 4
    assert looks[0].lr < looks[1].lr < looks[2].lr
    constant = [schedules.Look(item.step, item.spectra, item.kept, 1.0, 0) for item in looks]
    assert any(decisions(compressm.WhenStable(200), constant))


def test_resumes_between_two_checks(training):
    """The memory of the last check travels in the state; the guard sets it back."""
    run = training(ranks=(8,), steps=0, lr=1e-9)
    schedule = compressm.WhenStable(100, check=0.05, force=0.5)
    options = {"policy": compressm.FixedRank(4), "schedule": schedule}
    guard = compressm.Rollback(lambda model: float(model.lrus[0].d_state != 8), recovery=1, failures=1, jump=None)
    one = compressm.Compressor(run.model, run.optimizer, guard=guard, **options)
    for _ in range(7):
        run.step()
        assert one.step() is None
    other = copy.deepcopy(run)
    two = compressm.Compressor(other.model, other.optimizer, guard=guard, **options)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for part, compressor in ((run, one), (other, two)):
        found = []
        for _ in range(10):
            part.step()
            found.append(compressor.step())
        assert [i for i, report in enumerate(found) if report] == [7, 8]
        assert compressor.guard.stopped
        assert compressor.ranks == {"lrus.0": 8}
        assert compressor._progress.memory["quiet"] == 2


def test_no_second_look_after_the_reduction(training, monkeypatch):
    run = training(ranks=(8,), steps=0, lr=1e-9)
    schedule = compressm.WhenStable(100, check=0.05, force=0.5)
    x = run.batch()[0]
    looks = []
    monkeypatch.setattr(compressm.compression.planning.plans, "collect", lambda *a, **k: looks.append(1) or collect(*a, **k))
    compressor = compressm.Compressor(
        run.model, run.optimizer, policy=compressm.FixedRank(4), schedule=schedule, calibration=[x]
    )
    for _ in range(60):
        run.step()
        compressor.step()
    assert len(looks) == 3
    assert [report.step for report in compressor.history] == [15]
    compressor.close()
