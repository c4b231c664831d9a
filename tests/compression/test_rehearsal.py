"""A Compressor tries its calibration when it is built."""

from __future__ import annotations

import random
from collections import deque

import pytest
import torch
from torch import nn

import compressm
from compressm.compression import CalibrationWarning
from compressm.errors import ArgumentError, CompressmError, DataError, NumericalError
from compressm.layers import LRU


def compressor_of(model, calibration, optimizer=None, **options):
    return compressm.Compressor(
        model, optimizer, policy=compressm.FixedRank(3), schedule=compressm.At([1]), calibration=calibration, **options
    )


class NoForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.lru = LRU(2, 8)


@pytest.mark.parametrize(
    ("make", "calibration", "options", "error", "match"),
    [
        (NoForward, [torch.zeros(2, 9, 2)], {}, DataError, r"calibration: running .* batch failed \(NotImpl.*forward="),
        (None, [torch.zeros(2, 2, 9, dtype=torch.float64)], {}, DataError, r"calibration: .*RuntimeError.*layout of training"),
        (None, [torch.zeros(2, 9, 2)], {}, DataError, r"calibration: .*RuntimeError"),
        (None, [], {}, DataError, "calibration: got no sequences"),
        (None, deque(maxlen=3), {}, DataError, "calibration: got no sequences"),
        (None, iter(()), {}, DataError, "calibration: got no sequences"),
        (None, 3, {}, ArgumentError, "calibration: expected an iterable of batches"),
        (None, torch.zeros(2, 9, 2), {}, ArgumentError, "calibration.*single batch into a list"),
        (None, ["text"], {}, ArgumentError, "calibration batch"),
        (None, [torch.full((2, 9, 2), float("nan"), dtype=torch.float64)], {}, NumericalError, "is not finite"),
        (lambda: LRU(2, 8), [torch.zeros(2, 2, 9)], {}, ArgumentError, "x: expected"),
        (None, [torch.zeros(2, 9, 2, dtype=torch.float64)], {"sequences": 0}, ArgumentError, "sequences: expected a positive"),
        (
            None, [torch.zeros(2, 9, 2)], {"forward": lambda model, x: model.head(torch.zeros(1, 4, dtype=torch.float64))},
            DataError, "no batch reached",
        ),
    ],
)  # fmt: skip
def test_a_measurement_that_cannot_work_fails_at_once(training, snapshot, make, calibration, options, error, match):
    run = training()
    model = run.model if make is None else make()
    optimizer = run.optimizer if make is None else torch.optim.Adam(model.parameters())
    before, state = snapshot(model, optimizer), torch.get_rng_state()
    with pytest.raises(error, match=match) as caught:
        compressor_of(model, calibration, optimizer, **options)
    assert isinstance(caught.value, CompressmError)
    before.check()
    assert torch.equal(torch.get_rng_state(), state)
    assert not optimizer._optimizer_step_post_hooks
    assert all(not module._forward_hooks for module in model.modules())


def test_a_measurement_that_works_leaves_no_trace(training, snapshot):
    run = training()
    x = run.batch(count=5)[0]
    sizes = []
    run.model.encoder.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    before, states = snapshot(run.model, run.optimizer), (torch.get_rng_state(), random.getstate())
    compressor = compressor_of(run.model, [x], run.optimizer)
    before.check()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert sizes == [1]
    assert compressor.step_count == 0
    assert compressor.history == []
    assert compressor.step().changed


def test_models_that_need_more_than_one_sequence(training):
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.lru = LRU(2, 8)

        def forward(self, x):
            return self.lru(x.view(4, 9, 2))

    model = Pairs()
    assert compressor_of(model, [torch.randn(4, 9, 2)]).step().changed
    with pytest.raises(DataError, match=r"running the model on a batch failed \(RuntimeError"):
        compressor_of(Pairs(), [torch.randn(5, 9, 2)])


def test_a_missing_half_is_told_at_once(training):
    run = training()

    def forward(model, x):
        return model(x).detach().requires_grad_()

    with pytest.warns(CalibrationWarning, match=r"reached layer\(s\) 'lrus\.0', 'lrus\.1'"):
        compressor_of(run.model, [run.batch()[0]], run.optimizer, forward=forward)


def test_one_shot_batches_are_kept(training):
    run = training()
    batches = [run.batch(count=2)[0] for _ in range(3)]
    given = []

    def generator():
        for batch in batches:
            given.append(len(given))
            yield batch

    compressor = compressor_of(run.model, generator(), run.optimizer)
    assert given == [0]
    listed = compressor_of(run.model, batches, run.optimizer)
    assert compressor.plan() == listed.plan() == compressor.plan()
    assert given == [0, 1, 2]
