"""Runs that are saved and resumed: bit for bit the same continuation, from every step, with every part of the state."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import compressm
from compressm.compression.saving import checkpoint
from compressm.errors import CheckpointError
from compressm.layers import LRU, Mamba

STEPS, REDUCTION = 20, 8


class Model(nn.Module):
    """(batch, length, 4) -> (batch, 3), with dropout and running statistics."""

    def __init__(self, mixer, dtype=torch.float32):
        super().__init__()
        self.mixer, self.norm = mixer, nn.BatchNorm1d(4, dtype=dtype)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(4, 3, dtype=dtype)

    def forward(self, x):
        return self.head(self.drop(self.norm((x + self.mixer(x)).mean(1))))


class Run:
    """Training whose batches and dropout come from the global generators."""

    def __init__(self, kind):
        torch.manual_seed(0)
        self.model = Model(LRU(4, 9) if kind == "lru" else Mamba(4, d_state=9))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 1e-2, total_steps=STEPS + 5)
        calibration = [torch.randn(4, 12, 4, generator=torch.Generator().manual_seed(1))]
        policy, schedule = compressm.Energy(tau=0.4), compressm.At([REDUCTION, 15])
        self.compressor = compressm.Compressor(
            self.model, self.optimizer, policy=policy, schedule=schedule, calibration=calibration
        )

    def step(self):
        x = torch.randn(8, 12, 4) * (1 + random.random()) + float(np.random.random())  # noqa: NPY002
        nn.functional.cross_entropy(self.model(x), torch.randint(3, (8,))).backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.compressor.step()

    def save(self, path):
        extra = {"scheduler": self.scheduler.state_dict()}
        compressm.save(path, self.model, optimizer=self.optimizer, compressor=self.compressor, extra=extra, rng=True)

    def load(self, path):
        extra = compressm.load(path, self.model, optimizer=self.optimizer, compressor=self.compressor, rng=True)
        self.scheduler.load_state_dict(extra["scheduler"])

    def state(self):
        history = [{**report.to_dict(), "seconds": 0} for report in self.compressor.history]
        generators = torch.get_rng_state(), random.getstate(), [*np.random.get_state()[1], np.random.get_state()[2]]  # noqa: NPY002
        return [self.model.state_dict(), self.optimizer.state_dict(), self.scheduler.state_dict(), history, generators]


def assert_equal(one, two, where=""):
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype, where
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_equal(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for index, (left, right) in enumerate(zip(one, two, strict=True)):
            assert_equal(left, right, f"{where}/{index}")
    else:
        assert one == two, where


@pytest.mark.parametrize("kind", ["lru", "mamba"])
def test_every_step_resumes_to_the_same_bits(kind, tmp_path):
    """From every step to the next one, random generators included, and from some to the end."""
    run = Run(kind)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    states, ranks = [], []
    for step in range(STEPS):
        run.save(tmp_path / str(step))
        run.step()
        states.append(copy.deepcopy(run.state()))
        ranks.append(run.compressor.ranks["mixer"])
    assert 9 == ranks[REDUCTION - 2] > ranks[REDUCTION - 1] >= ranks[-1]
    for start in range(STEPS):
        other = Run(kind)
        other.load(tmp_path / str(start))
        for step in range(start, STEPS if start in (0, REDUCTION - 1, REDUCTION, 14) else start + 1):
            other.step()
            assert_equal(other.state(), states[step], f"step {step} from {start}")


def test_random_states_only_on_request(tmp_path):
    run = Run("lru")
    without, with_states = tmp_path / "a", tmp_path / "b"
    compressm.save(without, run.model)
    compressm.save(with_states, run.model, rng=True)
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate()
    compressm.load(with_states, run.model)
    assert torch.equal(torch.get_rng_state(), before[0])
    with pytest.raises(CheckpointError, match=r"holds no states of random generators\. Save with rng=True"):
        compressm.load(without, run.model, rng=True)
    assert (torch.get_rng_state() == before[0]).all()
    assert random.getstate() == before[1]


def test_a_large_history_goes_into_tensors(tmp_path, monkeypatch):
    run = Run("lru")
    for _ in range(REDUCTION):
        run.step()
    (report,) = run.compressor.history
    wide = {**report.to_dict(), "layers": [{**report.to_dict()["layers"][0], "spectrum": [1.5, *([0.1] * 2999)]}]}
    run.compressor.history = [type(report).from_dict(wide)] * 12
    run.save(tmp_path / "a")
    manifest, _ = checkpoint.read(tmp_path / "a")
    assert len(str(manifest)) < 30_000
    assert manifest["compressor"]["recipe"] == "default"
    assert manifest["compressor"]["history"][0]["layers"][0]["name"] == "mixer"
    assert manifest["dtypes"] == {"mixer": "float32"}
    other = Run("lru")
    other.load(tmp_path / "a")
    assert other.compressor.history == run.compressor.history
    monkeypatch.setattr(checkpoint, "MAX_TENSORS", 40)
    old = (tmp_path / "a").read_bytes()
    with pytest.raises(CheckpointError, match=r"at most 40 .*delete the first entries of compressor\.history"):
        run.save(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == old
    with pytest.raises(CheckpointError, match="at most 40"):
        other.load(tmp_path / "a")


def test_the_file_is_not_needed_any_more(tmp_path):
    """Safetensors maps files into memory: state that still lived there would change with the file."""
    run = Run("lru")
    run.step()
    run.save(tmp_path / "a")
    other = Run("lru")
    other.load(tmp_path / "a")
    with open(tmp_path / "a", "r+b") as file:
        file.write(bytes((tmp_path / "a").stat().st_size))
    assert_equal(other.state()[:4], run.state()[:4])


@pytest.mark.parametrize(("saved", "loaded"), [(torch.float32, torch.bfloat16), (torch.float32, torch.float64),
                                               (torch.bfloat16, torch.float32)])  # fmt: skip
def test_tensors_take_the_model_s_precision(tmp_path, saved, loaded):
    def build(dtype, states):
        model = Model(LRU(4, states, dtype=dtype), dtype)
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.randn(4, 5, 4, dtype=dtype)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = build(saved, 3)
    compressm.save(tmp_path / "a", model, optimizer=optimizer)
    other, its = build(loaded, 6)
    compressm.load(tmp_path / "a", other, optimizer=its)
    for (name, value), found in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        kept = not value.is_floating_point()
        assert found.dtype == (value.dtype if kept else loaded), name
        assert torch.equal(found, value.to(found.dtype)), name
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(its.state[q]["exp_avg"], optimizer.state[p]["exp_avg"].to(loaded))
    its.step()


def test_values_that_do_not_fit_the_precision(tmp_path):
    model = Model(LRU(4, 3))
    with torch.no_grad():
        model.head.weight[0, 0] = 1e6
    compressm.save(tmp_path / "a", model)
    other = Model(LRU(4, 3, dtype=torch.float16), torch.float16)
    before = other.head.weight.clone()
    with pytest.raises(CheckpointError, match=r"head.weight holds torch.float32 values that are too large for .*float16"):
        compressm.load(tmp_path / "a", other)
    assert torch.equal(other.head.weight, before)


class Masters(torch.optim.Optimizer):
    """Keeps a float32 copy of every bfloat16 parameter."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("master", p.detach().float())
                state["master"] -= group["lr"] * p.grad.float()
                p.copy_(state["master"])


def test_wide_optimizer_state_is_not_rounded(tmp_path):
    """torch's own load_state_dict would cast the masters to bfloat16."""
    def build(dtype):
        model = Model(LRU(4, 3, dtype=dtype), dtype)
        return model, Masters(model.parameters())

    model, optimizer = build(torch.bfloat16)
    model(torch.randn(4, 5, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    compressm.save(tmp_path / "a", model, optimizer=optimizer)
    other, its = build(torch.bfloat16)
    compressm.load(tmp_path / "a", other, optimizer=its)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert its.state[q]["master"].dtype == torch.float32
        assert torch.equal(its.state[q]["master"], optimizer.state[p]["master"])
    assert not torch.equal(its.state[q]["master"], its.state[q]["master"].bfloat16().float())


def test_tensor_learning_rates_keep_their_kind(tmp_path):
    def build(lr):
        model = Model(LRU(4, 3))
        return model, torch.optim.AdamW(model.parameters(), lr=torch.tensor(lr, dtype=torch.float64))

    model, optimizer = build(0.25)
    compressm.save(tmp_path / "a", model, optimizer=optimizer)
    other, its = build(0.5)
    compressm.load(tmp_path / "a", other, optimizer=its)
    assert torch.equal(its.param_groups[0]["lr"], torch.tensor(0.25, dtype=torch.float64))


def test_an_optimizer_keeps_its_own_implementation(tmp_path):
    """A run saved with CUDA's capturable steps goes on where there are none."""

    def build(**options):
        model = Model(LRU(4, 3))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, **options)

    model, optimizer = build(fused=True)
    model(torch.randn(4, 5, 4)).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["capturable"] = True
    compressm.save(tmp_path / "a", model, optimizer=optimizer)
    other, its = build(foreach=True)
    compressm.load(tmp_path / "a", other, optimizer=its)
    group = its.param_groups[0]
    assert (group["fused"], group["foreach"], group["capturable"]) == (None, True, False)
    other(torch.randn(4, 5, 4)).sum().backward()
    its.step()
    assert all(its.state[p]["step"] == 2 for p in other.parameters())


def test_a_model_on_the_meta_device(tmp_path):
    compressm.save(tmp_path / "a", Model(LRU(4, 3)))
    with torch.device("meta"):
        other = Model(LRU(4, 3))
    with pytest.raises(CheckpointError, match=r"is on the meta device.*model.to_empty"):
        compressm.load(tmp_path / "a", other)
    with pytest.raises(CheckpointError, match=r"model/.* got a meta tensor"):
        compressm.save(tmp_path / "a", other)
    other.to_empty(device="cpu")
    compressm.load(tmp_path / "a", other)
    assert all(torch.isfinite(p).all() for p in other.parameters())


class TestStrictness:
    """Models that fit in part."""

    @pytest.fixture
    def saved(self, tmp_path):
        model = nn.ModuleDict({"a": LRU(4, 3), "b": LRU(4, 5), "head": nn.Linear(4, 2)})
        compressm.save(tmp_path / "a", model)
        return model, tmp_path / "a"

    def test_takes_what_both_have(self, saved):
        model, path = saved
        other = nn.ModuleDict({"b": LRU(4, 9), "c": LRU(4, 7), "head": nn.Linear(4, 2)})
        untouched = other["c"].B_re.detach().clone()
        with pytest.warns(UserWarning, match=r"fits the model in part: missing \['c.B_im', .* unexpected \['a.B_im'"):
            compressm.load(path, other, strict=False)
        assert other["b"].d_state == 5
        assert torch.equal(other["b"].B_re, model["b"].B_re)
        assert torch.equal(other["head"].weight, model["head"].weight)
        assert torch.equal(other["c"].B_re, untouched)

    def test_shapes_must_fit_all_the_same(self, saved):
        other = nn.ModuleDict({"b": LRU(4, 9), "head": nn.Linear(3, 2)})
        with pytest.warns(UserWarning, match="in part"), pytest.raises(CheckpointError, match=r"head.weight is \(2, 4\)"):
            compressm.load(saved[1], other, strict=False)
        assert other["b"].d_state == 9

    def test_names_the_prefix_of_a_wrapper(self, saved):
        wrapped = nn.ModuleDict({"module": saved[0]})
        hint = r"the model's names begin with 'module\.': was the model wrapped, or is it a part\?"
        with pytest.raises(CheckpointError, match=hint):
            compressm.load(saved[1], wrapped)

    def test_names_what_was_renamed(self, saved):
        model, path = saved
        model["haed"] = model.pop("head")
        hint = r"missing \['haed.bias', 'haed.weight'\], unexpected \['head.bias', 'head.weight'\] \(is 'head.bias' what is"
        with pytest.raises(CheckpointError, match=hint):
            compressm.load(path, model)


@pytest.mark.parametrize(("where", "value", "match"), [
    ("parameter", float("nan"), "model/head.weight holds NaN: training has diverged"),
    ("parameter", float("inf"), "model/head.weight holds infinity"),
    ("buffer", float("nan"), "model/norm.running_var holds NaN"),
    ("moment", float("nan"), "exp_avg holds NaN"),
])  # fmt: skip
def test_a_diverged_run_does_not_replace_its_last_good_checkpoint(tmp_path, where, value, match):
    run = Run("lru")
    run.step()
    run.save(tmp_path / "a")
    old = (tmp_path / "a").read_bytes()
    moment = run.optimizer.state[run.model.head.weight]["exp_avg"]
    tensor = {"parameter": run.model.head.weight, "buffer": run.model.norm.running_var, "moment": moment}[where]
    with torch.no_grad():
        tensor.view(-1)[0] = value
    with pytest.raises(CheckpointError, match=match):
        run.save(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == old


def test_infinite_buffers_are_no_divergence(tmp_path):
    model = nn.ModuleDict({"lru": LRU(4, 3)})
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    compressm.save(tmp_path / "a", model)
    compressm.load(tmp_path / "a", model)
    assert model.mask[1] == -torch.inf
