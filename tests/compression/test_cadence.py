"""Calls of step() that do not keep step with the optimizer are noticed; skipped steps of AMP are not."""

from __future__ import annotations

import warnings

import pytest
import torch

import compressm
from compressm.compression import ScheduleWarning
from compressm.errors import ArgumentError


def compressor_of(run, **options):
    return compressm.Compressor(
        run.model, run.optimizer, policy=compressm.FixedRank(8), schedule=compressm.At([500]), **options
    )


def drive(run, compressor, pattern, rounds):
    """One round: "s" an optimizer step, "c" a call of the compressor."""
    for _ in range(rounds):
        for letter in pattern:
            if letter == "s":
                run.optimizer.step()
            else:
                compressor.step()


@pytest.fixture
def run(training):
    return training(steps=1)


@pytest.mark.parametrize("pattern", ["ccs", "ccccs", "csc"])
def test_a_call_per_micro_batch_is_noticed_once(run, pattern):
    calls = pattern.count("c")
    with pytest.warns(ScheduleWarning, match=rf"is called {calls} times per optimizer step.*too early.*micro-batch") as caught:
        drive(run, compressor_of(run), pattern, 30)
    assert len(caught) == 1


def test_a_call_per_several_steps_is_noticed_once(run):
    with pytest.warns(ScheduleWarning, match="takes 3 steps per call of Compressor.step.*too late") as caught:
        drive(run, compressor_of(run), "sssc", 30)
    assert len(caught) == 1


def test_another_optimizer_is_noticed(run):
    with pytest.warns(ScheduleWarning, match="called 64 times while the optimizer that it was given took no step") as caught:
        drive(run, compressor_of(run), "c", 200)
    assert len(caught) == 1


@pytest.mark.parametrize(
    "pattern",
    ["sc" * 100, "c" * 30 + "sc" * 100, ("c" * 2 + "sc" * 9) * 10, "sc" * 50 + "ssc" + "sc" * 50, "ccs" * 5 + "sc" * 100],
)
def test_what_amp_does_is_fine(run, pattern):
    """Skipped steps, many at first, then a few now and then."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drive(run, compressor_of(run), pattern, 1)


def test_grad_scaler(training):
    """The real thing: the scale starts far too high, then grows beyond what fits every 20 steps."""
    run = training(dtype=torch.float32, steps=0, lr=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=20, growth_factor=2.0**8)
    compressor = compressor_of(run)
    taken = 0

    def count(optimizer, args, kwargs):
        nonlocal taken
        taken += 1

    run.optimizer.register_step_post_hook(count)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(150):
            x, y = run.batch()
            loss = torch.nn.functional.cross_entropy(run.model(x), y) * 2.0**80
            run.optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(run.optimizer)
            scaler.update()
            compressor.step()
    assert 0 < taken < 150
    assert compressor.step_count == 150


def test_the_most_patient_of_several_optimizers_counts(training):
    """A critic that steps five times per call is no fault."""
    run = training(steps=1)
    halves = list(run.model.parameters())
    split = [torch.optim.SGD(part, lr=1e-9) for part in (halves[::2], halves[1::2])]
    compressor = compressm.Compressor(run.model, split, policy=compressm.FixedRank(8), schedule=compressm.At([500]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            for _ in range(5):
                split[0].step()
            split[1].step()
            compressor.step()


def test_steps_that_no_hook_sees(run):
    """A captured or hand-written update: that the model trains is seen from its parameters."""
    compressor = compressor_of(run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(200):
            with torch.no_grad():
                run.model.head.bias.sub_(1e-3)
            compressor.step()


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: compressm.At([5, 20, 30], total_steps=10), r"none after total_steps = 10, got attempts at \[20, 30\]"),
        (lambda: compressm.Every(1, 11, 20, total_steps=10), r"none after total_steps = 10, got attempts at \[11\]"),
        (lambda: compressm.At([1], total_steps=0), "total_steps: expected a positive integer"),
    ],
)
def test_schedules_that_never_fire(build, match):
    with pytest.raises(ArgumentError, match=match):
        build()


def test_every_ends_with_training():
    assert compressm.Every(4, 2, 50, total_steps=12).steps == (2, 6, 10)
    assert not compressm.Every(4, 2, 50, total_steps=12).due(14)
