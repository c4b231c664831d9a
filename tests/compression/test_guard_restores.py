"""What the guard puts back is what was there, bit for bit."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from compression.guard_cases import Script, same
from torch import nn

import compressm
from compressm.compression import GuardReport, ReductionReport
from compressm.errors import ArgumentError, CheckpointError, NumericalError


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
    snapshot = compressm.compression.guard.snapshot.Snapshot
    parts = compressm.compression.guard.snapshot.Parts(
        run.model, compressm.compression.common.models.compressible_layers(run.model), (optimizer,)
    )
    taken = snapshot.take(parts, {"step": 1}, 8 << 30, None)
    masters = [optimizer.state[p]["master"].clone() for p in run.model.parameters()]
    with torch.no_grad():
        for p in [*run.model.parameters(), scale]:
            p.add_(1)
    optimizer.state.clear()
    optimizer.param_groups[1].update(lr=7, new=1)
    assert taken.restore(parts) == {}
    assert taken.progress == {"step": 1}
    assert torch.equal(scale, torch.ones(3))
    assert optimizer.param_groups[1]["lr"] == 0.5
    assert "new" not in optimizer.param_groups[1]
    found = [optimizer.state[p]["master"] for p in run.model.parameters()]
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(found, masters, strict=True))
