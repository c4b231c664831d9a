"""An undo is complete wherever it begins: an interruption in the middle, an error on the way back, a load that fails late."""

from __future__ import annotations

import copy
import sys
from itertools import count

import pytest
import torch
from compression.guard_cases import Script, same
from compression.test_surgery import edits_for
from torch import nn

import compressm
from compressm.compression.guard import probation as guards
from compressm.compression.guard import snapshot as snapshots
from compressm.compression.saving import manifest
from compressm.compression.surgery import audit
from compressm.compression.surgery import edits as surgery
from compressm.compression.surgery.references import References, take_back
from compressm.errors import CheckpointError, CompressmError, OptimizerError


class Interruption:
    """Ctrl-C at one event among those in some functions: at a line, or between two bytecodes of one."""

    def __init__(self, *files, functions=None, opcodes=True):
        self.files, self.functions, self.opcodes = {file.__file__ for file in files}, functions, opcodes
        self.at, self.seen = 0, 0

    def __call__(self, frame, event, arg):
        code = frame.f_code
        if code.co_filename not in self.files or not (self.functions is None or code.co_name in self.functions):
            return None
        frame.f_trace_opcodes = self.opcodes
        return self._local

    def _local(self, frame, event, arg):
        if event == ("opcode" if self.opcodes else "line"):
            self.seen += 1
            if self.seen == self.at:
                raise KeyboardInterrupt
        return self._local

    def during(self, function, at):
        """Call the function with an interruption at event number ``at``; returns whether there were so many."""
        self.at, self.seen = at, 0
        before = sys.gettrace()
        with torch.enable_grad():  # a trace, unlike Ctrl-C, also comes between the body of a with statement and its end
            sys.settrace(self)
            try:
                function()
            except KeyboardInterrupt:
                return True
            finally:
                sys.settrace(before)
        return False


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
    interruption = Interruption(surgery, functions={"_commit", "<lambda>", "do", "undo", "put"})
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


class Sealed(dict):
    """Averages of which one cannot be written."""

    def __setitem__(self, key, value):
        if key == "lrus.0.nu_log":
            raise RuntimeError("sealed")
        super().__setitem__(key, value)


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


# A rollback.


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
        names = {"go", "restore", "_pieces", "_fill_module", "_fill_optimizer"}
        interruption = Interruption(guards, snapshots, functions=names, opcodes=False)
        if not interruption.during(compressor.step, at):
            break
        check_back(one, compressor, before)
    assert at > 100


# A refusal.


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
