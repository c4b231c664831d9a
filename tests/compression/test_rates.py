"""The learning rate after a cut: in optimizers and schedulers, reported, and undone with the cut."""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler

import compressm
from compressm.compression import ScheduleWarning
from compressm.errors import ArgumentError
from compressm.layers import LRU

STEPS = 10


def build(make=None, *, at=(4,), lr=1e-2, register=True, **options):
    torch.manual_seed(0)
    model = LRU(3, 8)
    named = dict(model.named_parameters())
    groups = [{"params": [named.pop("D")], "lr": 5 * lr}, {"params": list(named.values())}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    scheduler = None if make is None else make(optimizer)
    options = {"policy": compressm.FixedRank(3), "lr_after": 3.0, **options}
    compressor = compressm.Compressor(model, optimizer, schedule=compressm.At(at), **options)
    if scheduler is not None and register:
        compressor.register(scheduler=scheduler)
    return model, optimizer, scheduler, compressor


def train(model, optimizer, scheduler, compressor, steps=STEPS):
    """The rates of both groups in every step."""
    rates = []
    for _ in range(steps):
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        model(torch.randn(2, 7, 3)).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        compressor.step()
    return rates


SCHEDULERS = {
    "none": None,
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "steps": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "one after another": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(o, 5)], [5]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_all_rates_are_multiplied_from_the_cut_on(name):
    plain = train(*build(SCHEDULERS[name], lr_after=None))
    changed = train(*build(SCHEDULERS[name]))
    factors = torch.tensor(changed) / torch.tensor(plain)
    torch.testing.assert_close(factors, torch.tensor([[1.0, 1.0]] * 4 + [[3.0, 3.0]] * 6), rtol=1e-5, atol=0.0)


def test_reported_and_once_alone():
    *parts, compressor = build(at=(2, 4, 6), policy=compressm.Shrink(0.5))
    rates = train(*parts, compressor)
    assert [rate[1] for rate in rates] == pytest.approx([1e-2] * 2 + [3e-2] * 8)
    words = ["learning rate x3" in report.reason for report in compressor.history]
    assert words == [True, False, False]
    *parts, compressor = build(policy=compressm.FixedRank(8))
    assert train(*parts, compressor)[-1][1] == 1e-2  # nothing was cut
    assert "learning rate" not in compressor.history[0].reason


def test_a_rate_that_is_a_tensor_stays_the_same_object():
    rate = torch.tensor(1e-2)
    *parts, compressor = build(lr=rate)
    (_, optimizer, _) = parts
    train(*parts, compressor)
    assert optimizer.param_groups[1]["lr"] is rate
    assert float(rate) == pytest.approx(3e-2)


def test_undone_with_the_cut_and_refused_with_it():
    metric = iter([0.0, 0.0, 5.0])  # before, right after, at the end of the window
    guard = compressm.Rollback(lambda model: next(metric, 5.0), tolerance=0.1, jump=0.5, recovery=3, failures=1)
    model, optimizer, scheduler, compressor = build(SCHEDULERS["lambda"], guard=guard)
    train(model, optimizer, scheduler, compressor, 6)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(3e-2 / 7)
    train(model, optimizer, scheduler, compressor, 1)
    assert model.d_state == 8
    assert scheduler.base_lrs == [5e-2, 1e-2]
    assert optimizer.param_groups[1]["lr"] == pytest.approx(1e-2 / 5)
    assert optimizer.param_groups[1]["initial_lr"] == 1e-2
    metric = iter([0.0])
    guard = compressm.Rollback(lambda model: next(metric, 5.0), tolerance=0.1, jump=0.5, recovery=3)
    model, optimizer, scheduler, compressor = build(SCHEDULERS["lambda"], guard=guard)
    train(model, optimizer, scheduler, compressor, 5)
    assert compressor.history[0].outcome == "refused"
    assert scheduler.base_lrs == [5e-2, 1e-2]


def test_a_scheduler_that_is_not_registered_is_told_of():
    with pytest.warns(ScheduleWarning, match=r"lr_after: .* Call compressor\.register"):
        train(*build(SCHEDULERS["lambda"], register=False))


@pytest.mark.parametrize("wrong", [0, -1.0, float("inf"), True, "2"])
def test_wrong_factors_are_refused(wrong):
    with pytest.raises(ArgumentError, match="lr_after: expected a positive number"):
        build(lr_after=wrong)
