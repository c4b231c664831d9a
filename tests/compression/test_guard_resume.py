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
