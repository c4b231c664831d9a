"""What a guard undoes comes back completely: after an error or an interruption on the way back, and in a refusal."""

from __future__ import annotations

import copy
from itertools import count

import pytest
from compression.guard_cases import Script, same
from compression.interruptions import Interruption, Sealed
from torch import nn

import compressm
from compressm.compression.guard import probation
from compressm.compression.guard import snapshot as snapshots
from compressm.compression.surgery import packed_optimizer
from compressm.errors import CompressmError


class Reluctant:
    """A registered object that does not take its state back."""

    def __init__(self, *failures):
        self.failures, self.taken = list(failures), 0

    def state_dict(self):
        return {"a": 1}

    def load_state_dict(self, state):
        if self.failures:
            raise self.failures.pop(0)
        self.taken += 1


def on_probation(whole, ema="module", last=2.0, **objects):
    """A run whose reduction fails its validation with the next step, its compressor and its state before the reduction."""
    one = whole(ema=ema)
    compressor = one.guarded(compressm.Rollback(Script(1.0, 1.0, last), recovery=2, failures=2))
    compressor.register(**objects)
    one.steps(compressor, 2)
    one.step()
    before = one.state()
    compressor.step()
    one.steps(compressor, 1)
    one.step()
    return one, compressor, before


def check_back(one, compressor, before, but=()):
    after = one.state()
    assert [part for part, value in before.items() if not same(value, after[part])] == list(but)
    assert compressor.ranks == {"lrus.0": 8, "lrus.1": 6}
    assert (compressor.step_count, compressor.guard.failures, compressor.guard.probation) == (3, 1, None)
    assert compressor._progress.attempts == 1


@pytest.mark.parametrize("disposed", ["first", "last"])
def test_an_object_that_does_not_take_its_state_back(whole, disposed):
    reluctant = Reluctant(RuntimeError("boom"))
    one, compressor, before = on_probation(whole, **{"thing": reluctant})
    if disposed == "first":
        compressor.registered = {"thing": compressor.registered.pop("thing"), **compressor.registered}
    with pytest.raises(CompressmError, match=r"registered object 'thing' did not take back .* step 3 \(RuntimeError: boom\)"):
        compressor.step()
    check_back(one, compressor, before)
    report = compressor.history[-1]
    assert (report.outcome, report.changed, report.resumed_at) == ("rolled back", True, 3)
    assert "everything but for registered object 'thing' (RuntimeError: boom) is as it was at step 3" in report.reason
    assert one.steps(compressor, 1)[0].ranks == {"lrus.0": 6, "lrus.1": 5}  # the gentler attempt


class Scaled(nn.Module):
    """Extra state that is refused when it comes back."""

    def __init__(self):
        super().__init__()
        self.fine = True

    def get_extra_state(self):
        return {"scale": 2.0}

    def set_extra_state(self, state):
        if not self.fine:
            raise ValueError("no scale")


def test_an_average_that_does_not_come_back(whole):
    one, compressor, before = on_probation(whole, ema="dict")
    one.model.extra = nn.Linear(1, 1)
    with pytest.raises(CompressmError, match="snapshot"):  # the model is another one than that put aside
        compressor.step()
    del one.model.extra
    assert compressor.guard.probation is not None
    compressor.ema = Sealed(compressor.ema)
    with pytest.raises(CompressmError, match=r"ema did not take back its state of step 3 \(RuntimeError: sealed\)"):
        compressor.step()
    check_back(one, compressor, before, but=["ema"])


def test_extra_state_that_is_refused(training):
    run = training()
    run.model.scaled = Scaled()
    guard = compressm.Rollback(Script(1.0, 1.0, 2.0), recovery=1)
    policy, schedule = compressm.FixedRank(3), compressm.At([1], total_steps=9)
    compressor = compressm.Compressor(run.model, run.optimizer, policy=policy, schedule=schedule, guard=guard)
    run.step()
    before = copy.deepcopy(dict(run.model.named_parameters()))
    compressor.step()
    run.step()
    run.model.scaled.fine = False
    with pytest.raises(CompressmError, match=r"extra state of the model did not take back .*ValueError: no scale"):
        compressor.step()
    assert same(dict(run.model.named_parameters()), before)
    assert compressor.step_count == 1


def test_ctrl_c_in_an_object_s_own_code_during_a_rollback(whole):
    reluctant = Reluctant(KeyboardInterrupt())
    one, compressor, before = on_probation(whole, thing=reluctant)
    with pytest.raises(KeyboardInterrupt):
        compressor.step()
    check_back(one, compressor, before)
    assert reluctant.taken == 1


def test_ctrl_c_anywhere_in_a_rollback(whole):
    """Once it has begun it is finished first: the model, the optimizers and the counts belong together at every event."""
    for at in count(1, 23):
        one, compressor, before = on_probation(whole, ema="dict")
        names = {"go", "restore", "_pieces", "_fill_module", "fill_in_place"}
        interruption = Interruption(probation, snapshots, packed_optimizer, functions=names, opcodes=False)
        if not interruption.during(compressor.step, at):
            break
        check_back(one, compressor, before)
    assert at > 100


@pytest.mark.parametrize("ema", [None, "module", "dict"])
def test_a_refused_attempt_leaves_every_object_where_it_was(whole, snapshot, ema):
    one = whole(ema=ema)
    compressor = one.guarded(compressm.Rollback(Script(1.0, 2.0), tries=2))
    one.steps(compressor, 2)
    one.step()
    before = snapshot(one.model, one.optimizer, ema=ema and one.ema)
    hooked = []
    handle = one.model.head.weight.register_hook(lambda grad: hooked.append(1))
    report = compressor.step()
    assert (report.outcome, report.changed) == ("refused", False)
    before.check()
    one.step()
    assert hooked
    handle.remove()


def test_ctrl_c_in_the_metric_right_after_a_cut(whole, snapshot):
    def metric(model):
        if model.lrus[0].d_state < 8:
            raise KeyboardInterrupt
        return 1.0

    one = whole(ema="dict")
    compressor = one.guarded(compressm.Rollback(metric))
    one.steps(compressor, 2)
    one.step()
    before = snapshot(one.model, one.optimizer, ema=one.ema)
    with pytest.raises(KeyboardInterrupt):
        compressor.step()
    before.check()
    assert compressor.guard.probation is None
