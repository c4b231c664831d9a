"""The guard: what it puts back is what was there, and when it does."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import compressm
from compressm.compression import GuardReport, ReductionReport, ScheduleWarning
from compressm.errors import ArgumentError, CheckpointError, NumericalError


class Script:
    """A metric that gives the listed values in turn, then the last one for ever."""

    def __init__(self, *values):
        self.values, self.calls = list(values), 0

    def __call__(self, model):
        assert not model.training
        assert not torch.is_grad_enabled()
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        model.norms[0].running_mean.add_(1)
        value = self.values[min(self.calls, len(self.values) - 1)]
        self.calls += 1
        return value


def same(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


class Whole:
    """A run with everything that real ones have: scheduler, EMA, data order and a counter."""

    def __init__(self, run, ema=None):
        self.run, self.model, self.optimizer, self.ema = run, run.model, run.optimizer, ema
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, 50)
        self.counters = {"batches": 0, "seen": torch.zeros(2)}

    def step(self):
        self.run.step()
        self.scheduler.step()
        self.model.volatile += torch.rand(2)
        self.counters["batches"] += 1
        self.counters["seen"] += 1
        random.random(), np.random.rand()  # noqa: NPY002
        if isinstance(self.ema, nn.Module):
            self.ema.update_parameters(self.model)
        elif self.ema is not None:
            for name, p in self.model.named_parameters():
                self.ema[name] = 0.9 * self.ema[name] + 0.1 * p.detach()

    def state(self):
        ema = self.ema.state_dict() if isinstance(self.ema, nn.Module) else self.ema
        tree = {
            "model": dict(self.model.named_parameters()) | dict(self.model.named_buffers()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "ema": dict(ema or {}),
            "data": self.run.random.get_state(),
            "counters": self.counters,
            "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
        }
        return copy.deepcopy(tree)

    def guarded(self, guard, policy=None, schedule=None, **options):
        policy, schedule = policy or compressm.FixedRank(3), schedule or compressm.At([3], total_steps=100)
        compressor = compressm.Compressor(
            self.model, self.optimizer, policy=policy, schedule=schedule, guard=guard, ema=self.ema, **options
        )
        compressor.register(scheduler=self.scheduler, data=self.run.random, counters=self.counters)
        return compressor

    def steps(self, compressor, count):
        reports = []
        for _ in range(count):
            self.step()
            reports.append(compressor.step())
        return reports


@pytest.fixture
def whole(training):
    def build(optimizer=torch.optim.AdamW, ema=None, **options):
        run = training(optimizer, **options)
        run.model.register_buffer("volatile", torch.zeros(2, dtype=torch.float64), persistent=False)
        averaged = {"module": AveragedModel, "dict": lambda m: copy.deepcopy(dict(m.named_parameters()))}.get(ema)
        if averaged is not None:
            averaged = averaged(run.model)
            if isinstance(averaged, dict):
                averaged = {name: p.detach() for name, p in averaged.items()}
        return Whole(run, averaged)

    return build


@pytest.mark.parametrize(
    ("optimizer", "options", "ema", "disk_bytes"),
    [
        (torch.optim.AdamW, {"amsgrad": True}, "module", 8 << 30),
        (torch.optim.AdamW, {"fused": True}, "dict", 0),
        (torch.optim.SGD, {"momentum": 0.9}, None, 8 << 30),
        (torch.optim.Adam, {"capturable": False, "lr": torch.tensor(0.01)}, "dict", 8 << 30),
    ],
)
def test_a_rollback_goes_on_as_if_nothing_had_happened(whole, optimizer, options, ema, disk_bytes, tmp_path):
    one = whole(optimizer, ema, **options)
    guard = compressm.Rollback(Script(1.0, 1.0, 2.0), recovery=2, failures=1, disk_bytes=disk_bytes, folder=tmp_path)
    compressor = one.guarded(guard)
    one.steps(compressor, 2)
    one.step()
    before, other = one.state(), copy.deepcopy(one)
    group, weight = one.optimizer.param_groups[0], one.model.encoder.weight
    assert isinstance(compressor.step(), ReductionReport)
    assert compressor.ranks == {"lrus.0": 3, "lrus.1": 3}
    assert bool(list(tmp_path.iterdir())) == (disk_bytes == 0)
    assert one.steps(compressor, 1) == [None]
    (report,) = one.steps(compressor, 1)
    assert isinstance(report, GuardReport)
    assert (report.outcome, report.step, report.resumed_at, compressor.step_count) == ("rolled back", 5, 3, 3)
    assert report.ranks == compressor.ranks == {"lrus.0": 8, "lrus.1": 6}
    assert [lru.d_state for lru in one.model.lrus] == [8, 6]
    assert list(tmp_path.iterdir()) == []
    after = one.state()
    for part, value in before.items():
        assert same(value, after[part]), part
    assert one.optimizer.param_groups[0] is group
    assert one.model.encoder.weight is weight
    assert all(p.grad is None for p in one.model.parameters())
    torch.set_rng_state(before["random"][0])
    random.setstate(before["random"][1])
    numpy = np.random.get_state()  # noqa: NPY002
    for _ in range(3):
        other.step()
    torch.set_rng_state(before["random"][0])
    random.setstate(before["random"][1])
    np.random.set_state(numpy)  # noqa: NPY002
    one.steps(compressor, 3)
    left, right = one.state(), other.state()
    for part in left.keys() - {"random"}:
        assert same(left[part], right[part]), part
    if isinstance(one.ema, nn.Module):
        assert one.ema.module.lrus[0].d_state == 8
        one.ema(one.run.batch()[0])


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


def test_a_rollback_after_raised_ranks_is_as_exact(whole):
    """The snapshot is restored twice, and what was trained in between must not have run into it."""
    one = whole(ema="dict")
    guard = compressm.Rollback(Script(1.0, 2.0), recovery=3, failures=1, quick=Script(1.0, 2.0, 1.0))
    compressor = one.guarded(guard)
    one.steps(compressor, 2)
    one.step()
    before = one.state()
    assert compressor.step().ranks == {"lrus.0": 6, "lrus.1": 5}
    assert one.steps(compressor, 3)[-1].outcome == "rolled back"
    after = one.state()
    for part, value in before.items():
        assert same(value, after[part]), part


@pytest.mark.parametrize(("policy", "tried"), [(compressm.FixedRank(2), 3), (compressm.FixedRank(7), 1)])
def test_a_refused_attempt_changes_nothing(whole, policy, tried):
    one = whole(ema="dict")
    metric = Script(1.0, float("inf"), float("nan"), 1.2)
    compressor = one.guarded(compressm.Rollback(metric), policy, compressm.At([3, 5], total_steps=100))
    one.steps(compressor, 2)
    one.step()
    before = one.state()
    report = compressor.step()
    after = one.state()
    assert all(same(value, after[part]) for part, value in before.items())
    assert (report.outcome, report.reference, report.step, report.resumed_at) == ("refused", 1.0, 3, 3)
    assert metric.calls == 1 + tried
    assert report.ranks == compressor.ranks == {"lrus.0": 8, "lrus.1": 6}
    assert compressor.guard.failures == 0
    metric.values, metric.calls = [1.0, 1.0], 0
    assert one.steps(compressor, 2)[1].changed


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
    assert "HalfWay(policy=FixedRank(ranks=2))" in reports[6].reason
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


def test_an_error_in_the_metric_puts_everything_back(whole):
    def metric(model):
        if model.lrus[0].d_state < 8:
            raise ZeroDivisionError
        return 1.0

    one = whole(ema="module")
    compressor = one.guarded(compressm.Rollback(metric))
    one.steps(compressor, 2)
    one.step()
    before = one.state()
    with pytest.raises(ZeroDivisionError):
        compressor.step()
    after = one.state()
    assert all(same(value, after[part]) for part, value in before.items())
    for value, error, match in ((float("nan"), NumericalError, "nan before the reduction"), ("low", ArgumentError, "a number")):
        other = whole()
        compressor = other.guarded(compressm.Rollback(lambda model, value=value: value))
        other.steps(compressor, 2)
        with pytest.raises(error, match=match):
            other.steps(compressor, 1)


@pytest.mark.parametrize("last", [1.0, 2.0])
@pytest.mark.parametrize("disk_bytes", [0, 8 << 30])
def test_resumes_on_probation_bit_for_bit(whole, tmp_path, last, disk_bytes):
    """Saved between the cut and its validation; the file brings what a rollback needs into a fresh full-size model."""
    guard = compressm.Rollback(Script(1.0, 1.0, last), recovery=3, failures=1, disk_bytes=disk_bytes)
    one = whole(amsgrad=True)
    compressor = one.guarded(guard)
    one.steps(compressor, 4)
    assert compressor.guard.probation.snapshot.on_disk == (disk_bytes == 0)
    extra = {"scheduler": one.scheduler.state_dict(), "data": one.run.random.get_state(), "counters": one.counters}
    extra["volatile"] = one.model.volatile
    path = compressm.save(tmp_path / "a", one.model, optimizer=one.optimizer, compressor=compressor, extra=extra)
    two = whole(amsgrad=True, steps=1)
    again = two.guarded(compressm.Rollback(Script(last), recovery=3, failures=1, disk_bytes=disk_bytes))
    found = compressm.load(path, two.model, optimizer=two.optimizer, compressor=again)
    assert again.ranks == {"lrus.0": 3, "lrus.1": 3}
    two.scheduler.load_state_dict(found["scheduler"])
    two.run.random.set_state(found["data"])
    two.counters.update(found["counters"])
    two.model.volatile.copy_(found["volatile"])
    for part, its in ((one, compressor), (two, again)):
        torch.manual_seed(11)
        part.reports = [report and report.outcome for report in part.steps(its, 5)]
    outcome = "accepted" if last == 1.0 else "rolled back"
    assert one.reports == two.reports == [None, outcome, None, None, None]
    assert compressor.step_count == again.step_count == (9 if last == 1.0 else 6)
    left, right = one.state(), two.state()
    for part in left.keys() - {"random"}:
        assert same(left[part], right[part]), part
    assert torch.equal(left["random"][0], right["random"][0])
    timeless = [{k: v for k, v in report.to_dict().items() if k != "seconds"} for report in compressor.history]
    assert [{k: v for k, v in report.to_dict().items() if k != "seconds"} for report in again.history] == timeless


def test_a_state_on_probation_is_checked(whole):
    one = whole()
    compressor = one.guarded(compressm.Rollback(Script(1.0), recovery=3))
    one.steps(compressor, 4)
    state = compressor.state_dict()
    plain = one.guarded(None)
    with pytest.raises(ArgumentError, match="guard: expected a Rollback"):
        plain.load_state_dict(state)
    fresh = one.guarded(compressm.Rollback(Script(1.0), recovery=3))
    snapshot = state["guard"]["probation"]["snapshot"]
    changes = [
        ({"ranks": {"lrus.0": 8}}, "those of layers"),
        ({"ranks": {"lrus.0": 9, "lrus.1": 6}}, r"other parameters \(lrus\.0\.B_im"),
        ({"registered": {}}, r"Register the same objects"),
        ({"ema": {}}, "got an EMA, expected none|expected none, got an EMA"),
        ({"optimizers": []}, "optimizer groups"),
        ({"model": None}, "snapshot"),
        ({"homes": {"a": "nowhere"}}, "snapshot"),
        ({"progress": {"step": 1}}, "Compressor.state_dict"),
        ({"random": {}}, "random states: malformed"),
        ({"random": {**snapshot["random"], "torch": torch.zeros(3)}}, "torch does not take that of cpu"),
        ({"random": {**snapshot["random"], "numpy": {**snapshot["random"]["numpy"], "position": 625}}}, "numpy is malformed"),
    ]
    for change, match in changes:
        guard = {**state["guard"], "probation": {**state["guard"]["probation"], "snapshot": {**snapshot, **change}}}
        with pytest.raises(ArgumentError, match=match):
            fresh.load_state_dict({**state, "guard": guard})
    for key in snapshot:
        cut = {name: value for name, value in snapshot.items() if name != key}
        guard = {**state["guard"], "probation": {**state["guard"]["probation"], "snapshot": cut}}
        with pytest.raises(ArgumentError, match="snapshot"):
            fresh.load_state_dict({**state, "guard": guard})
    for bad in (3, {}, {**state["guard"], "best": "x"}, {**state["guard"], "probation": 7}):
        with pytest.raises(ArgumentError, match="state_dict guard"):
            fresh.load_state_dict({**state, "guard": bad})
    assert fresh.step_count == 0
    fresh.load_state_dict(state)
    assert same(fresh.state_dict(), state)


def test_random_states_as_the_libraries_give_them_come_back(whole):
    """Files hold tuples of Python and numpy where they were written so; on another number of GPUs, these keep theirs."""
    one = whole()
    compressor = one.guarded(compressm.Rollback(Script(1.0, 1.0, 2.0), recovery=2, failures=1))
    one.steps(compressor, 3)
    state = compressor.state_dict()
    saved = dict(state["guard"]["probation"]["snapshot"]["random"])
    random.seed(3)
    np.random.seed(4)  # noqa: NPY002
    np.random.normal()  # noqa: NPY002
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    saved |= {"python": random.getstate(), "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest)}
    saved["cuda"] = [torch.get_rng_state()] * (torch.cuda.device_count() + 1)
    expected = [random.random(), random.gauss(), np.random.normal(), np.random.random()]  # noqa: NPY002
    state["guard"]["probation"]["snapshot"]["random"] = saved
    compressor.load_state_dict(state)
    reports = one.steps(compressor, 2)
    assert reports[-1].outcome == "rolled back"
    assert [random.random(), random.gauss(), np.random.normal(), np.random.random()] == expected  # noqa: NPY002


def test_objects_that_were_not_registered_in_time(whole):
    one = whole()
    compressor = one.guarded(compressm.Rollback(Script(1.0, 1.0, 3.0), recovery=1))
    one.steps(compressor, 3)
    compressor.register(late={})
    one.step()
    ranks = compressor.ranks
    with pytest.raises(ArgumentError, match=r"registered objects \['counters', 'data', 'scheduler'\]"):
        compressor.step()
    assert compressor.ranks == ranks
    with pytest.raises(ArgumentError, match="scaler: expected an object with state_dict"):
        compressor.register(scaler=5)


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


def test_a_full_disk(whole, tmp_path):
    one = whole()
    compressor = one.guarded(compressm.Rollback(Script(1.0), disk_bytes=0, folder=tmp_path / "missing"))
    one.steps(compressor, 2)
    before = one.state()
    with pytest.raises(CheckpointError, match=r"snapshot: cannot be written to .*missing.*disk_bytes"):
        compressor.step()
    assert same(before["model"], one.state()["model"])
    assert compressor.ranks == {"lrus.0": 8, "lrus.1": 6}


def test_wider_moments_and_foreign_parameters_come_back(training):
    """bf16 parameters whose moments are fp32, and a trained parameter that is not the model's."""
    run = training(dtype=torch.float32, steps=0)
    run.model.bfloat16()
    scale = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([{"params": run.model.parameters()}, {"params": [scale], "lr": 0.5}], lr=0.1)
    for p in run.model.parameters():
        optimizer.state[p]["master"] = p.detach().float() + 1e-5
    snapshot = compressm.compression.snapshot.Snapshot
    parts = compressm.compression.snapshot.Parts(
        run.model, compressm.compression.planning.compressible_layers(run.model), (optimizer,)
    )
    taken = snapshot.take(parts, {"step": 1}, 8 << 30, None)
    masters = [optimizer.state[p]["master"].clone() for p in run.model.parameters()]
    with torch.no_grad():
        for p in [*run.model.parameters(), scale]:
            p.add_(1)
    optimizer.state.clear()
    optimizer.param_groups[1].update(lr=7, new=1)
    assert taken.restore(parts) == {"step": 1}
    assert torch.equal(scale, torch.ones(3))
    assert optimizer.param_groups[1]["lr"] == 0.5
    assert "new" not in optimizer.param_groups[1]
    found = [optimizer.state[p]["master"] for p in run.model.parameters()]
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(found, masters, strict=True))


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
