"""A run that is saved with a reduction on probation can still undo it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from compression.guard_cases import Script, same

import compressm
from compressm.errors import ArgumentError


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
    wrong = [{"best": "x"}, {"best": None}, {"unwatched": "x"}, {"probation": 7}]
    for bad in (3, {}, *({**state["guard"], **change} for change in wrong)):
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


def test_a_guard_that_comes_in_mid_life_compares_with_what_it_found(whole, tmp_path):
    """The run before had none: the value before the first reduction that the guard watches is the bar, also after a resume."""
    schedule = compressm.At([2, 5, 9], total_steps=60)
    one = whole(ranks=(20, 20))
    plain = one.guarded(None, compressm.Shrink(0.5), schedule)
    one.steps(plain, 3)
    path = compressm.save(tmp_path / "a", one.model, optimizer=one.optimizer, compressor=plain)
    two = whole(ranks=(20, 20), steps=1)
    metric = Script(1.0, 1.0, 1.004, 1.004, 1.004, 1.006)
    late = two.guarded(compressm.Rollback(metric, recovery=2), compressm.Shrink(0.5), schedule)
    compressm.load(path, two.model, optimizer=two.optimizer, compressor=late)
    assert late.guard.best is None
    reduced, accepted = [report for report in two.steps(late, 4) if report]
    assert reduced.ranks == {"lrus.0": 5, "lrus.1": 5}
    assert (accepted.outcome, accepted.reference) == ("accepted", 1.0)
    words = "the best before the first reduction that the guard watched (after 1 that it did not)"
    assert f"allowed is 0.005 worse than 1, {words}" in accepted.reason
    path = compressm.save(tmp_path / "b", two.model, optimizer=two.optimizer, compressor=late)
    three = whole(ranks=(20, 20), steps=1)
    again = three.guarded(compressm.Rollback(metric, recovery=2), compressm.Shrink(0.5), schedule)
    compressm.load(path, three.model, optimizer=three.optimizer, compressor=again)
    undone = three.steps(again, 4)[-1]
    assert (undone.outcome, undone.reference) == ("rolled back", 1.0)
    assert words in undone.reason
    assert again.ranks == {"lrus.0": 5, "lrus.1": 5}


def test_a_late_guard_on_probation_resumes(whole, tmp_path):
    one = whole(ranks=(20, 20))
    plain = one.guarded(None, compressm.Shrink(0.5), compressm.At([1, 3], total_steps=60))
    one.steps(plain, 2)
    late = one.guarded(compressm.Rollback(Script(3.0), recovery=2), compressm.Shrink(0.5), plain.schedule)
    late.load_state_dict(plain.state_dict())
    one.steps(late, 1)
    state = late.state_dict()
    assert (state["guard"]["best"], state["guard"]["unwatched"]) == (3.0, 1)
    other = one.guarded(compressm.Rollback(Script(4.0), recovery=2), compressm.Shrink(0.5), plain.schedule)
    other.load_state_dict(state)
    assert one.steps(other, 2)[-1].outcome == "rolled back"
    assert other.ranks == {"lrus.0": 10, "lrus.1": 10}


def test_a_run_without_a_guard_loaded_where_one_was_at_work(whole):
    one = whole()
    compressor = one.guarded(compressm.Rollback(Script(1.0), recovery=5))
    early = one.guarded(None).state_dict()
    one.steps(compressor, 2)
    plain = compressor.state_dict() | {"guard": None}
    one.steps(compressor, 1)
    assert compressor.guard.probation is not None
    with pytest.raises(ArgumentError, match="ranks"):
        compressor.load_state_dict(early)
    assert compressor.guard.probation is not None
    compressor.load_state_dict(plain | {"ranks": compressor.ranks})
    assert (compressor.guard.probation, compressor.guard.best, compressor.guard.failures) == (None, None, 0)
