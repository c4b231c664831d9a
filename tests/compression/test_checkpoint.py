"""Checkpoints: bitwise round trips, damage, full disks and killed writers."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import compressm
from compressm.compression.saving import checkpoint
from compressm.errors import ArgumentError, CheckpointError, OptimizerError

ROOT = Path(compressm.__file__).parents[1]


def compressor_of(run, schedule=None, policy=None):
    policy, schedule = policy or compressm.Energy(tau=0.3, gate=1.0), schedule or compressm.At([2, 4])
    return compressm.Compressor(run.model, run.optimizer, policy=policy, schedule=schedule)


def advance(run, compressor, steps):
    for _ in range(steps):
        run.step()
        compressor.step()


def assert_same(one, two):
    assert one.keys() == two.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == two[key].dtype, key
            assert torch.equal(value, two[key]), key
        elif isinstance(value, dict):
            assert_same(value, two[key])
        else:
            assert value == two[key], key


@pytest.fixture
def reduced(training):
    """A run after the first of two reductions, and its compressor."""
    run = training(torch.optim.AdamW, ranks=(9, 7), steps=0, amsgrad=True)
    compressor = compressor_of(run)
    advance(run, compressor, 3)
    assert compressor.ranks["lrus.0"] < 9
    return run, compressor


@pytest.fixture
def fresh(training):
    return lambda **options: training(torch.optim.AdamW, **({"ranks": (9, 7), "amsgrad": True, "steps": 1} | options))


def test_a_fresh_full_size_model_goes_on_bit_for_bit(reduced, fresh, tmp_path):
    run, compressor = reduced
    extra = {"epoch": 3, "rng": torch.get_rng_state(), "best": float("inf"), "names": ("a", None)}
    path = compressm.save(tmp_path / "a.safetensors", run.model, optimizer=run.optimizer, compressor=compressor, extra=extra)
    other = fresh()
    optimizer, groups = other.optimizer, [id(group) for group in other.optimizer.param_groups]
    again = compressor_of(other)
    found = compressm.load(path, other.model, optimizer=optimizer, compressor=again)
    assert_same(found, extra)
    assert again.ranks == compressor.ranks
    assert_same(dict(run.model.state_dict()), dict(other.model.state_dict()))
    assert_same(run.optimizer.state_dict()["state"], optimizer.state_dict()["state"])
    assert run.optimizer.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    assert again.state_dict() == compressor.state_dict()
    assert len(groups) == len(optimizer.param_groups)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in other.model.parameters()}
    other.random.set_state(run.random.get_state())
    for part, its in ((run, compressor), (other, again)):
        torch.manual_seed(1)
        advance(part, its, 3)
    assert [report.step for report in again.history] == [2, 4]
    assert_same(dict(run.model.state_dict()), dict(other.model.state_dict()))


def test_model_alone(reduced, fresh, tmp_path):
    run, _ = reduced
    path = compressm.save(str(tmp_path / "a"), run.model)
    other = fresh().model
    assert compressm.load(str(path), other) is None
    assert_same(dict(run.model.state_dict()), dict(other.state_dict()))
    x = run.batch()[0]
    assert torch.equal(run.model.eval()(x), other.eval()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_and_compiled_wrappers(make_net, tmp_path, dtype):
    model = make_net(dtype=dtype)
    path = compressm.save(tmp_path / "a", torch.compile(model))
    other = make_net(dtype=dtype)
    compressm.load(path, torch.compile(other))
    assert_same(dict(model.state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize(("cls", "options"), [(torch.optim.Adafactor, {}), (torch.optim.SGD, {"momentum": 0.9})])
def test_other_optimizers(training, tmp_path, cls, options):
    """Adafactor keeps state in other shapes than its parameters."""
    run = training(torch.optim.SGD, steps=0)
    run.optimizer = cls(run.model.parameters(), lr=1e-2, **options)
    run.step(2)
    path = compressm.save(tmp_path / "a", run.model, optimizer=run.optimizer)
    other = training(torch.optim.SGD, ranks=(8, 6), steps=0)
    other.optimizer = cls(other.model.parameters(), lr=5.0, **options)
    compressm.load(path, other.model, optimizer=other.optimizer)
    assert_same(run.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"])
    assert other.optimizer.param_groups[0]["lr"] == 1e-2


def test_several_optimizers(make_net, tmp_path):
    def build():
        model = make_net()
        lru = list(model.lrus.parameters())
        rest = [p for p in model.parameters() if all(p is not q for q in lru)]
        return model, [torch.optim.SGD(rest, lr=0.1, momentum=0.9), torch.optim.Adam(lru, lr=0.2)]

    model, optimizers = build()
    model(torch.randn(2, 5, 2, dtype=torch.float64)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    path = compressm.save(tmp_path / "a", model, optimizer=optimizers)
    other, others = build()
    compressm.load(path, other, optimizer=others)
    for one, two in zip(optimizers, others, strict=True):
        assert_same(one.state_dict()["state"], two.state_dict()["state"])
    with pytest.raises(CheckpointError, match="holds the state of 2 optimizers, expected 1"):
        compressm.load(path, other, optimizer=others[0])
    with pytest.raises(CheckpointError, match="groups hold other parameters"):
        compressm.load(path, other, optimizer=others[::-1])


@pytest.fixture
def saved(reduced, tmp_path):
    run, compressor = reduced
    path = compressm.save(tmp_path / "a", run.model, optimizer=run.optimizer, compressor=compressor)
    return run, path


def assert_refused(path, fresh, snapshot, match, error=CheckpointError, **options):
    other = fresh(**options)
    compressor = compressor_of(other)
    before, progress = snapshot(other.model, other.optimizer), compressor.state_dict()
    with pytest.raises(error, match=match):
        compressm.load(path, other.model, optimizer=other.optimizer, compressor=compressor)
    before.check()
    assert compressor.state_dict() == progress


@pytest.mark.parametrize("share", [0, 1e-4, 0.05, 0.3, 0.6, 0.99, 1 - 1e-9])
def test_truncated_files(saved, fresh, snapshot, share):
    _, path = saved
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert_refused(path, fresh, snapshot, r"not readable as safetensors.*expected a checkpoint written by compressm\.save")


@pytest.mark.parametrize("place", ["length", "header", "manifest", "first", "middle", "last"])
def test_flipped_bits(saved, fresh, snapshot, place):
    _, path = saved
    data = bytearray(path.read_bytes())
    body = 8 + struct.unpack("<Q", data[:8])[0]
    index = {
        "length": 0, "header": 9, "manifest": data.index(b"ranks"), "first": body, "middle": (body + len(data)) // 2,
        "last": len(data) - 1,
    }[place]  # fmt: skip
    data[index] ^= 1
    path.write_bytes(data)
    assert_refused(path, fresh, snapshot, str(path))


def test_other_files(saved, fresh, snapshot, tmp_path):
    run, path = saved
    assert_refused(tmp_path / "gone", fresh, snapshot, "gone: no such file")
    assert_refused(tmp_path, fresh, snapshot, "not readable")
    path.write_bytes(b"\x80\x04pickle" * 20)
    assert_refused(path, fresh, snapshot, "not readable as safetensors")
    safetensors.torch.save_file({"x": torch.zeros(2)}, path)
    assert_refused(path, fresh, snapshot, "has no compressm manifest")
    for text in ("[]", "{}", '{"format": "1"}'):
        safetensors.torch.save_file({"x": torch.zeros(2)}, path, metadata={"compressm": text})
        assert_refused(path, fresh, snapshot, "has no compressm manifest")
    safetensors.torch.save_file({"x": torch.zeros(2)}, path, metadata={"compressm": "{"})
    assert_refused(path, fresh, snapshot, "manifest is not JSON")
    future = json.dumps({"format": 2, "compressm": "9.9"})
    safetensors.torch.save_file({"x": torch.zeros(2)}, path, metadata={"compressm": future})
    assert_refused(path, fresh, snapshot, r"format 2 \(compressm 9\.9\) is newer than 1\. Upgrade compressm")
    assert run.model.lrus[0].d_state < 9


def test_other_models_and_optimizers(saved, fresh, snapshot, training, tmp_path):
    _, path = saved
    assert_refused(path, fresh, snapshot, r"state-space layers \['lrus\.0', 'lrus\.1'\], expected", ranks=(9, 7, 3))
    other = training(torch.optim.AdamW, ranks=(9, 7))
    other.model.head = nn.Linear(4, 5, dtype=torch.float64)
    before = snapshot(other.model)
    with pytest.raises(CheckpointError, match=r"head\.\w+ is .*, expected"):
        compressm.load(path, other.model)
    before.check()
    other.model.more = nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match=r"missing \['more\.bias', 'more\.weight'\]"):
        compressm.load(path, other.model)
    run = fresh()
    compressm.save(path, run.model)
    with pytest.raises(CheckpointError, match="holds no compressor state"):
        compressm.load(path, run.model, compressor=compressor_of(run))
    with pytest.raises(CheckpointError, match="holds the state of 0 optimizers, expected 1"):
        compressm.load(path, run.model, optimizer=run.optimizer)
    compressor = compressor_of(run)
    compressm.save(path, run.model, compressor=compressor)
    paper = compressm.Compressor(
        run.model, run.optimizer, policy=compressm.Energy(tau=0.1), schedule=compressm.At([1]), recipe="paper"
    )
    with pytest.raises(ArgumentError, match="recipe"):
        compressm.load(path, run.model, compressor=paper)


def test_a_compressor_of_another_model_is_found_before_anything_changes(reduced, fresh, snapshot, tmp_path):
    _, compressor = reduced
    run = fresh()
    path = compressm.save(tmp_path / "a", run.model, optimizer=run.optimizer, compressor=compressor)
    assert_refused(path, fresh, snapshot, "compressor state has ranks .* Save a model together with its own compressor")


def test_what_cannot_be_saved(reduced, make_net, tmp_path):
    run, _ = reduced
    with pytest.raises(CheckpointError, match="extra/a: got set"):
        compressm.save(tmp_path / "a", run.model, extra={"a": {1}})
    with pytest.raises(OptimizerError, match="group 0 holds parameters that are not the model's"):
        compressm.save(tmp_path / "a", make_net(), optimizer=run.optimizer)

    class Extra(nn.Module):
        def get_extra_state(self):
            return {"calls": 3}

    run.model.extra = Extra()
    with pytest.raises(CheckpointError, match=r"extra state \['extra\._extra_state'\] is no tensor"):
        compressm.save(tmp_path / "a", run.model)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder(reduced, tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot be written.*No such file or directory"):
        compressm.save(tmp_path / "no" / "a", reduced[0].model)


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace", "write"])
def test_full_disk_leaves_the_old_file(saved, monkeypatch, tmp_path, call):
    run, path = saved
    old = path.read_bytes()
    if call == "write":
        opened = os.fdopen

        def broken(descriptor, mode, closefd):
            file = opened(descriptor, mode, 0, closefd=closefd)

            class File:
                def __enter__(self):
                    return self

                def __exit__(self, *_):
                    file.close()

                def write(self, data):
                    file.write(data[:100])
                    full_disk()

            return File()

        monkeypatch.setattr(os, "fdopen", broken)
    else:
        monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\); \d+ bytes are needed"):
        compressm.save(path, run.model)
    monkeypatch.undo()
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_flushed_is_told_truthfully(saved, monkeypatch):
    run, path = saved
    flush, calls = os.fsync, []

    def second_fails(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            full_disk()
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", second_fails)
    with pytest.raises(CheckpointError, match="written, but its folder cannot be flushed"):
        compressm.save(path, run.model, extra="new")
    assert compressm.load(path, run.model) == "new"


def test_a_killed_writer_leaves_the_old_file(saved):
    run, path = saved
    old = path.read_bytes()
    code = f"""
import os, signal, torch, compressm
from compressm.layers import LRU
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
compressm.save({str(path)!r}, torch.nn.Sequential(LRU(2, 3)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == old
    compressm.load(path, run.model)


def test_no_pickle_and_readable_elsewhere(saved):
    """Any safetensors reader sees the tensors, and the manifest names ranks."""
    run, path = saved
    tensors = safetensors.torch.load_file(path)
    assert torch.equal(tensors["model/lrus.0.B_re"], run.model.lrus[0].B_re)
    manifest, _ = checkpoint.read(path)
    assert manifest["ranks"] == {f"lrus.{i}": lru.d_state for i, lru in enumerate(run.model.lrus)}
    assert manifest["format"] == 1
