"""Undoing a reduction or a load is complete wherever it begins: interruptions, errors on the way back, failures late in it."""

from __future__ import annotations

import sys
from itertools import count

import pytest
import torch
from compression.guard_cases import Script, same
from compression.interruptions import Interruption, Sealed
from compression.test_surgery import edits_for
from torch import nn

import compressm
from compressm.compression.saving import manifest
from compressm.compression.surgery import audit
from compressm.compression.surgery import edits as surgery
from compressm.compression.surgery.references import References, take_back
from compressm.errors import CheckpointError, OptimizerError


@pytest.fixture
def commit(training, monkeypatch):
    """The commit of a reduction of a run with optimizer state and an average, ready to be made; (run, average, commit)."""
    run = training(amsgrad=True)
    average = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(surgery, "_commit", lambda *arguments: calls.append(arguments))
        edits, layers = edits_for(run.model)
        surgery.apply_edits(run.model, edits, layers, optimizers=[run.optimizer], ema=average)
    model, optimizers, swaps, actions, *rest = calls[0]
    return run, average, lambda: surgery._commit(model, optimizers, swaps, list(actions), *rest)


def test_ctrl_c_between_any_two_bytecodes_of_a_reduction(commit, snapshot):
    """Until the audit has passed everything goes back, bit for bit and object for object; from there on everything is done."""
    run, average, make = commit
    before = snapshot(run.model, run.optimizer, ema=average)
    interruption = Interruption(surgery, functions={"_commit"})
    for at in count(1):
        assert interruption.during(make, at)
        if run.model.lrus[0].d_state == 3:
            break
        before.check()
    assert at > 500
    audit.audit(run.model, [run.optimizer])
    assert [lru.d_state for lru in run.model.lrus] == [3, 3]
    assert all(average[name].shape == p.shape for name, p in run.model.named_parameters())
    assert interruption.seen == at


def test_ctrl_c_while_a_reduction_is_undone(training, snapshot, monkeypatch):
    class Stubborn(list):
        def __setitem__(self, index, value):
            pass

    run = training()
    run.optimizer.param_groups[0]["params"] = Stubborn(run.optimizer.param_groups[0]["params"])
    before = snapshot(run.model, run.optimizer)
    edits, layers = edits_for(run.model)
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(surgery, "_commit", lambda *arguments: calls.append(arguments))
        surgery.apply_edits(run.model, edits, layers, optimizers=[run.optimizer])
    model, optimizers, swaps, actions, *rest = calls[0]

    def make():
        with pytest.raises(OptimizerError, match="lost"):
            surgery._commit(model, optimizers, swaps, list(actions), *rest)

    interruption = Interruption(sys.modules[take_back.__module__], functions={"undo"})
    for at in count(1, 3):
        if not interruption.during(make, at):
            break
        before.check()
    before.check()
    assert at > 100


def test_an_undo_that_fails_keeps_no_other_from_being_made(training, snapshot):
    run = training()
    average = Sealed({name: p.detach().clone() for name, p in run.model.named_parameters()})
    before = snapshot(run.model, run.optimizer, ema=average)
    edits, layers = edits_for(run.model)
    with pytest.raises(RuntimeError, match="sealed"):
        surgery.apply_edits(run.model, edits, layers, optimizers=[run.optimizer], ema=average)
    before.check()
    references = References(layers, [run.optimizer], average)
    surgery.apply_edits(run.model, edits, layers, optimizers=[run.optimizer])
    with pytest.raises(RuntimeError, match="sealed"):
        references.restore()
    before.check()


def test_references_hold_master_copies(make_net, snapshot):
    model = make_net(dtype=torch.float32).bfloat16()
    masters = {name: nn.Parameter(p.detach().float()) for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(masters.values())
    compressm.compression.attach_masters(optimizer, model, masters)
    kept = dict(masters)
    edits, layers = edits_for(model)
    before, references = snapshot(model, optimizer), References(layers, [optimizer], None)
    surgery.apply_edits(model, edits, layers, optimizers=[optimizer])
    assert masters["lrus.0.nu_log"].shape == (3,)
    references.restore()
    assert all(masters[name] is value for name, value in kept.items())
    before.check()


# A load.


class Broken(compressm.Compressor):
    """Loads, and then fails."""

    failure: BaseException | None = None

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if self.failure is not None:
            raise self.failure


def broken(one, guard):
    compressor = Broken(
        one.model, one.optimizer, policy=compressm.FixedRank(3), schedule=compressm.At([3], total_steps=100), guard=guard
    )
    compressor.register(scheduler=one.scheduler, data=one.run.random, counters=one.counters)
    return compressor


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), CheckpointError("late")])
def test_a_load_that_fails_after_the_compressor_has_been_loaded(whole, snapshot, tmp_path, failure):
    """A reduction on probation, its snapshot on disk, can still be undone bit for bit."""
    (tmp_path / "shelf").mkdir()
    other = whole()
    fresh = other.guarded(compressm.Rollback(Script(1.0), recovery=5))
    other.steps(fresh, 1)
    path = compressm.save(tmp_path / "early", other.model, optimizer=other.optimizer, compressor=fresh)
    one = whole()
    guard = compressm.Rollback(Script(1.0, 1.0, 2.0), recovery=2, failures=1, disk_bytes=0, folder=tmp_path / "shelf")
    compressor = broken(one, guard)
    one.steps(compressor, 2)
    one.step()
    before = one.state()
    compressor.step()
    one.steps(compressor, 1)
    state, history, probation = compressor.state_dict(), compressor.history, compressor.guard.probation
    now = snapshot(one.model, one.optimizer)
    compressor.failure = failure
    with pytest.raises(type(failure)):
        compressm.load(path, one.model, optimizer=one.optimizer, compressor=compressor)
    now.check()
    assert same(compressor.state_dict(), state)
    assert compressor.history is history
    assert compressor.guard.probation is probation
    assert len(history) == 1
    assert one.steps(compressor, 1)[0].outcome == "rolled back"
    after = one.state()
    assert all(same(value, after[part]) for part, value in before.items())
    compressor.failure = None
    compressm.load(path, one.model, optimizer=one.optimizer, compressor=compressor)
    assert compressor.step_count == 1
    assert compressor.history == []


def test_a_load_whose_snapshot_finds_no_room_on_disk(whole, tmp_path):
    one = whole()
    compressor = one.guarded(compressm.Rollback(Script(1.0), recovery=5))
    one.steps(compressor, 4)
    saved = compressor.state_dict()
    poor = one.guarded(compressm.Rollback(Script(1.0), recovery=5, disk_bytes=0, folder=tmp_path / "missing"))
    with pytest.raises(CheckpointError, match="snapshot: cannot be written"):
        poor.load_state_dict(saved)
    assert poor.step_count == 0
    assert poor.state_dict()["guard"] == {"best": None, "unwatched": 0, "failures": 0, "probation": None}


def test_ctrl_c_anywhere_in_a_load(whole, snapshot, tmp_path):
    small = whole()
    compressor = small.guarded(None)
    small.steps(compressor, 3)
    path = compressm.save(tmp_path / "small", small.model, optimizer=small.optimizer, compressor=compressor)
    one = whole()
    compressor = one.guarded(None)
    one.steps(compressor, 1)
    before, state = snapshot(one.model, one.optimizer), compressor.state_dict()

    def load():
        compressm.load(path, one.model, optimizer=one.optimizer, compressor=compressor)

    interruption = Interruption(manifest, surgery, functions={"apply", "reshape", "_commit"}, opcodes=False)
    for at in count(1, 5):
        if not interruption.during(load, at) or compressor.ranks["lrus.0"] == 3:  # done, or interrupted when all was done
            break
        before.check()
        assert same(compressor.state_dict(), state)
    assert at > 50
    assert compressor.ranks == {"lrus.0": 3, "lrus.1": 3}
    assert compressor.step_count == 3
    audit.audit(one.model, [one.optimizer])
