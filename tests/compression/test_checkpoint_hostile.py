"""Hostile and damaged files: refused with a CompressmError, and nothing has changed."""

from __future__ import annotations

import json
import os
import random
import struct

import pytest
import safetensors.torch
import torch
from fuzz.checkpoint_files import MUTATIONS, Parts, nested
from fuzz.checkpoints import Harness, Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import compressm
from compressm.compression.saving import checkpoint
from compressm.errors import CheckpointError, CompressmError
from compressm.layers import LRU


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    return Harness("lru", tmp_path_factory.mktemp("files"))


@pytest.fixture
def refused(harness):
    """refused(bytes, match): the file is refused with that message and changes nothing."""

    def check(data: bytes, match: str = "") -> None:
        run, path = Run("lru"), harness.path.with_name("refused")
        path.write_bytes(data)
        before = run.fingerprint()
        with pytest.raises(CompressmError, match=match):
            run.load(path)
        assert run.fingerprint() == before

    return check


@pytest.fixture(scope="module")
def harnesses(tmp_path_factory, harness):
    return {"lru": harness, "mamba": Harness("mamba", tmp_path_factory.mktemp("files"))}


MUTATION = st.sampled_from(sorted(MUTATIONS))


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(draw=st.randoms(use_true_random=False), kind=st.sampled_from(["lru", "mamba"]), mutation=MUTATION)
def test_mutated_files_are_refused_or_taken_as_they_say(harnesses, draw, kind, mutation):
    harness = harnesses[kind]
    assert harness.judge(MUTATIONS[mutation](draw, harness.data), mutation) in ("refused", "same", "accepted")


def test_the_harness_finds_faults(harness, monkeypatch):
    """A reader without checksum is found within a few files."""
    monkeypatch.setattr(checkpoint, "_checksum", lambda text, tensors: "")
    draw = random.Random(0)
    text = json.dumps(Parts(harness.data).manifest)
    data = safetensors.torch.save(Parts(harness.data).tensors, metadata={"compressm": text, "crc32": ""})

    def judge_many():
        for _ in range(300):
            harness.judge(MUTATIONS["damage"](draw, data), "damage")

    with pytest.raises(AssertionError, match="damage was accepted and has changed"):
        judge_many()
    harness.target = None


def test_every_cut(refused, harness):
    data = harness.data
    for percent in range(100):
        refused(data[: len(data) * percent // 100], "not readable as safetensors")


def test_flipped_bits_everywhere(tmp_path):
    """A bit of every byte, in header, padding, manifest and tensors: CRC-32 finds every one."""
    model = nn.Sequential(LRU(1, 1))
    path = compressm.save(tmp_path / "a", model)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    assert data[: 8 + length].endswith(b" "), "no padding in this header, choose another model"
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << random.Random(place).randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            checkpoint.read(path)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..\\..\\x", "model/../../x", "a\0b", "", "é" * 200])
def test_names_are_no_paths(refused, harness, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    parts = Parts(harness.data)
    parts.tensors[name] = torch.ones(2)
    refused(parts.build(), "holds tensors that its manifest does not name")
    parts.manifest["model"][name] = {"!tensor": name}
    refused(parts.build(), "does not fit the model: missing .*, unexpected")
    assert list(tmp_path.iterdir()) == []


def change(harness, edit):
    parts = Parts(harness.data)
    edit(parts)
    return parts.build()


def setting(*keys, to):
    """An edit of the manifest."""

    def edit(parts):
        node = parts.manifest
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = to

    return edit


STATE = ("optimizers", 0, "state", "head.bias")
MANIFESTS = [
    (setting("format", to=2), "format 2 .*is newer than 1. Upgrade compressm"),
    (setting("format", to=10**30), "format 1000000000000000000.* is newer"),
    (setting("format", to=True), "has no compressm manifest"),
    (setting("format", to=0), "has no compressm manifest"),
    (setting("ranks", "mixer", to=-4), "rank -4 of layer 'mixer', expected a positive integer"),
    (setting("ranks", "mixer", to=True), "rank True of layer"),
    (setting("ranks", "mixer", to=3.0), "rank 3.0 of layer"),
    (setting("ranks", "mixer", to=1 << 63), "rank 9223372036854775808"),
    (setting("ranks", "mixer", to=1 << 20), r"mixer\.\w+ has shape .*, expected 1048576 states"),
    (setting("ranks", "mixer", to=5), r"compressor state has ranks|mixer\.\w+ is"),
    (setting("ranks", to=[]), "ranks are a list"),
    (setting("more", to=1), "manifest: has .*expected"),
    (setting("extra", to=nested(200)), "nested deeper than 100"),
    (setting("extra", to={"!tensor": "model/head.bias"}), "malformed entry !tensor"),
    (setting("extra", to=[{"!tensor": "extra/ema"}] * 1000), "malformed entry !tensor"),
    (setting("model", "head.bias", to="abc"), "holds tensors that its manifest does not name|head.bias is a str"),
    (setting("model", to=[]), "manifest: model is a list"),
    (setting("complex", to=["gone"]), "complex tensor 'gone' is missing"),
    (setting("complex", to=3), "complex is no list"),
    (setting("optimizers", 0, "groups", 0, "lr", to="abc"), "optimizer group 0: lr is 'abc', expected one like 0.01"),
    (setting("optimizers", 0, "groups", 0, "lr", to=True), "lr is True"),
    (setting("optimizers", 0, "groups", 0, "lr", to={"!float": "nan"}), "lr is nan"),
    (setting("optimizers", 0, "groups", 0, "weight_decay", to=1e308), "weight_decay is 1e[+]308"),
    (setting("optimizers", 0, "groups", 0, "betas", to={"!tuple": [0.9]}), r"betas is \(0.9,\)"),
    (setting("optimizers", 0, "groups", 0, "betas", to={"!tuple": [0.9, 999.0]}), "AdamW does not take .*beta"),
    (setting("optimizers", 0, "groups", 0, "lr", to=-0.1), "AdamW does not take .*learning rate"),
    (setting("optimizers", 0, "groups", 0, "amsgrad", to="yes"), "amsgrad is 'yes'"),
    (setting("optimizers", 0, "groups", 0, "params", to=["head.bias"]), "groups hold other parameters"),
    (setting("optimizers", 0, "groups", to="abc"), "groups hold other parameters"),
    (setting("optimizers", 0, "more", to=[]), "optimizer state is malformed"),
    (setting("optimizers", to=[]), "holds tensors that its manifest|holds the state of 0 optimizers"),
    (setting(*STATE, "step", to="abc"), "step of 'head.bias' is 'abc'|holds tensors"),
    (setting("compressor", "step", to="7"), "state_dict step: expected a value of type"),
    (setting("compressor", "step", to=-1), "expected counts, and fractions"),
    (setting("compressor", "step", to=1 << 64), "state_dict step"),
    (setting("compressor", "kept", "mixer", to=0.0), "expected counts, and fractions"),
    (setting("compressor", "history", to=[3]), "state_dict history"),
    (setting("compressor", "history", 0, "layers", 0, "rank_after", to="3"), "history: expected .*rank_after"),
    (setting("compressor", "history", 0, "layers", 0, "spectrum", to=["a"]), "history: expected .*spectrum"),
    (setting("compressor", "history", 0, "layers", to=3), "history: expected"),
    (setting("compressor", "ranks", "mixer", to=3), "expected the same|ranks"),
    (setting("compressor", "guard", to=3), "state_dict guard"),
    (setting("compressor", "guard", to={"best": None}), "state_dict guard"),
    (setting("compressor", "memory", to="abc"), "state_dict: "),
    (setting("compressor", to=None), "holds no compressor state"),
    (setting("rng", to=None), "holds tensors that its manifest"),
    (setting("rng", "numpy", "position", to=100_000), "random states: that of numpy is malformed"),
    (setting("rng", "python", "gauss", to="abc"), "random states: that of python is malformed"),
]


@pytest.mark.parametrize(("edit", "match"), MANIFESTS, ids=range(len(MANIFESTS)))
def test_manifests_that_lie(refused, harness, edit, match):
    refused(change(harness, edit), match)


@pytest.mark.parametrize(("entry", "match"), [
    ('"format": 1, "format": 1', "a key occurs twice"),
    ('"format": NaN', "NaN is no JSON number"),
    ('"format": ' + "1" * 5000, "manifest is not JSON"),
    ('"format": ' + "[" * 100_000, "manifest is not JSON"),
    ('"format": 1, "\\ud800": 1', "manifest: has"),
])  # fmt: skip
def test_manifests_that_json_would_not_write(refused, harness, entry, match):
    parts = Parts(harness.data)
    refused(parts.build(json.dumps(parts.manifest).replace('"format": 1', entry, 1)), match)


def test_maxima_that_are_none(refused, harness):
    """amsgrad compares them in the next step."""

    def edit(parts):
        (optimizer,) = parts.manifest["optimizers"]
        entries = optimizer["state"]["head.bias"]
        del parts.tensors[entries["max_exp_avg_sq"]["!tensor"]]
        entries["max_exp_avg_sq"] = None

    refused(change(harness, edit), "has no max_exp_avg_sq")


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_moments_that_are_missing_or_narrow(refused, harness, key):
    def missing(parts):
        (optimizer,) = parts.manifest["optimizers"]
        del parts.tensors[optimizer["state"]["head.bias"].pop(key)["!tensor"]]

    refused(change(harness, missing), f"has no {key}")
    refused(change(harness, replacing(f"optimizers/0/state/head.bias/{key}", lambda v: v.half().long())), "int64")


def replacing(name, value):
    def edit(parts):
        parts.tensors[name] = value(parts.tensors[name])

    return edit


MOMENT = "optimizers/0/state/head.bias/exp_avg"
TENSORS = [
    (replacing("model/head.bias", lambda v: v * float("nan")), "head.bias holds NaN"),
    (replacing("model/head.bias", lambda v: v + float("inf")), "head.bias holds infinity"),
    (replacing("model/norm.running_mean", lambda v: v * float("nan")), "norm.running_mean holds NaN"),
    (replacing("model/head.bias", lambda v: v[:2].clone()), r"head.bias is \(2,\) torch.float32, expected \(5,\)"),
    (replacing("model/head.bias", lambda v: v.long()), r"head.bias is \(5,\) torch.int64"),
    (replacing("model/norm.num_batches_tracked", lambda v: v.float()), "num_batches_tracked is"),
    (replacing("model/norm.num_batches_tracked", lambda v: v.int()), "num_batches_tracked is"),
    (replacing("model/head.weight", lambda v: v + 1), "are one tensor in the model, but differ"),
    (replacing("model/mixer.B_re", lambda v: v[:, :3].contiguous()), r"mixer.B_re"),
    (replacing(MOMENT, lambda v: v[:2].clone()), r"exp_avg of 'head.bias' has shape \(2,\)"),
    (replacing("optimizers/0/state/phase/exp_avg", lambda v: v.half()), "exp_avg of 'phase' is torch.complex32"),
    (replacing(MOMENT, lambda v: v.long()), "exp_avg of 'head.bias' is torch.int64"),
    (replacing(MOMENT, lambda v: v * float("nan")), "exp_avg of 'head.bias' holds NaN"),
    (replacing("optimizers/0/state/head.bias/step", lambda v: v.half()), "step of 'head.bias' is"),
    (replacing("rng/torch", lambda v: v[:9].clone()), "random states: torch does not take that of cpu"),
    (replacing("rng/torch", lambda v: torch.full_like(v, 255)), "random states: torch does not take that of cpu"),
]


@pytest.mark.parametrize(("edit", "match"), TENSORS, ids=range(len(TENSORS)))
def test_tensors_that_lie(refused, harness, edit, match):
    refused(change(harness, edit), match)


def test_a_false_rank_takes_no_memory(refused, harness):
    """2^20 states would be hundreds of megabytes of blank parameters."""

    def edit(parts):
        parts.manifest["ranks"]["mixer"] = parts.manifest["compressor"]["ranks"]["mixer"] = 1 << 20

    allocated = []
    original = torch.zeros
    torch.zeros = lambda *a, **k: (allocated.append(a), original(*a, **k))[1]
    try:
        refused(change(harness, edit), "expected 1048576 states")
    finally:
        torch.zeros = original
    assert not [a for a in allocated if "1048576" in str(a)]


@pytest.mark.parametrize("length", [0, 1, 32 << 20, (32 << 20) + 1, 100_000_001, 2**63, 2**64 - 1])
def test_headers_of_any_length(refused, harness, length):
    refused(struct.pack("<Q", length) + harness.data[8:], "not readable as safetensors")


def test_things_that_are_no_files(tmp_path, harness):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(CheckpointError, match=r"not readable as safetensors|no such file"):
            checkpoint.read(path)


class Stop(BaseException):
    """As Ctrl-C at a bad moment."""


@pytest.mark.parametrize("error", [Stop, ValueError])
@pytest.mark.parametrize("moment", ["fill", "optimizer", "rng", "compressor"])
def test_interrupted_in_the_middle_of_loading(harness, monkeypatch, moment, error):
    """Everything is put back, whatever was done before."""
    run = Run("lru")
    run.step()
    harness.path.write_bytes(harness.data)

    def after(owner, name):
        call = getattr(owner, name)

        def interrupted(*args, **kwargs):
            call(*args, **kwargs)
            monkeypatch.undo()
            raise error("now")

        monkeypatch.setattr(owner, name, interrupted)

    before = run.fingerprint()
    if moment == "fill":
        count, copy = [], torch.Tensor.copy_

        def copies(self, other, *rest):
            count.append(self)
            if len(count) == 9:
                monkeypatch.undo()
                raise error("now")
            return copy(self, other, *rest)

        monkeypatch.setattr(torch.Tensor, "copy_", copies)
    elif moment == "optimizer":
        after(run.optimizer, "load_state_dict")
    elif moment == "rng":
        after(random, "setstate")
    else:
        after(compressm.Compressor, "load_state_dict")
    with pytest.raises((error, CheckpointError), match="now"):
        run.load(harness.path)
    vars(run.optimizer).pop("load_state_dict", None)
    assert run.fingerprint() == before
    run.load(harness.path)
    run.step()


def test_state_that_would_be_lost_is_refused(tmp_path):
    run = Run("lru")
    run.optimizer.state["global"] = {"d": 1.0}
    with pytest.raises(CheckpointError, match="state under 'global' belongs to no parameter"):
        run.save(tmp_path / "a")
    del run.optimizer.state["global"]
    loop = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match="nested deeper than 100 levels"):
        compressm.save(tmp_path / "a", run.model, extra=loop)
    with pytest.raises(CheckpointError, match="got an int of 20001 bits"):
        compressm.save(tmp_path / "a", run.model, extra=1 << 20_000)
    assert list(tmp_path.iterdir()) == []
    extra = {"\ud800": torch.ones(1), "big": 1 << 4000, "deep": nested(90)}
    compressm.save(tmp_path / "a", run.model, extra=extra)
    found = compressm.load(tmp_path / "a", run.model)
    assert torch.equal(found.pop("\ud800"), extra.pop("\ud800"))
    assert found == extra
