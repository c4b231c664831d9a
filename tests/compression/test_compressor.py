"""The Compressor in a training loop."""

from __future__ import annotations

import copy
import json
import logging
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import compressm
from compressm.adapters.lru import NAMES
from compressm.compression.compressor.progress import Progress
from compressm.errors import NumericalError
from compressm.layers import LRU


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def compressor_of(run, policy=None, schedule=None, **kwargs):
    policy, schedule = policy or compressm.FixedRank(3), schedule or compressm.At([1])
    return compressm.Compressor(run.model, run.optimizer, policy=policy, schedule=schedule, **kwargs)


def test_ten_line_example(make_net):
    """The example of the README, on a model and optimizer of the user's own."""
    torch.manual_seed(1)
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    x, y = torch.randn(6, 9, 2, dtype=torch.float64), torch.randint(3, (6,))
    with compressm.Compressor(
        model,
        optimizer,
        policy=compressm.Energy(tau=0.2),
        schedule=compressm.Once(10, at=0.2),
        calibration=[(x, y)],
    ) as compressor:
        reports = []
        for _ in range(10):
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            reports.append(compressor.step())
    assert [report is None for report in reports] == [True] + [False] + [True] * 8
    report = reports[1]
    assert report.changed
    assert report.step == 2
    assert report.ranks == compressor.ranks == {f"lrus.{i}": lru.d_state for i, lru in enumerate(model.lrus)}
    assert all(after < before for after, before in zip(report.ranks.values(), (8, 6), strict=True))
    assert compressor.history == [report]
    assert all(layer.gramians == "data" and layer.error_bound is None for layer in report.layers)
    assert all(layer.discarded <= 0.2 + 1e-9 for layer in report.layers)
    assert torch.isfinite(loss)
    assert optimizer is compressor.optimizers[0]


def test_plan_is_pure_and_step_keeps_its_word(training, snapshot):
    run = training()
    run.model.train()
    batches = [run.batch()[0] for _ in range(2)]
    compressor = compressor_of(run, compressm.Energy(tau=0.1), calibration=iter(batches), multiple_of=2)
    before, states = snapshot(run.model, run.optimizer), random_states()
    history = copy.deepcopy(compressor.state_dict())
    first, second = compressor.plan(), compressor.plan()
    before.check()
    assert random_states() == states
    assert run.model.training
    assert compressor.state_dict() == history
    assert first == second
    report = compressor.step()
    assert report.layers == first.layers
    assert all(layer.rank_after % 2 == 0 for layer in report.layers)


def test_reports_name_spectrum_and_kernels(training, caplog):
    run = training(dtype=torch.float32)
    with caplog.at_level(logging.INFO, "compressm"):
        report = compressor_of(run).step()
    for layer, lru in zip(report.layers, run.model.lrus, strict=True):
        assert (layer.convention, layer.gramians, layer.method) == ("real", "data-free", "balanced")
        assert len(layer.spectrum) == 2 * layer.rank_before
        assert layer.spectrum == tuple(sorted(layer.spectrum, reverse=True))
        assert layer.kernel_plan_before.startswith("lti_scan:")
        assert layer.kernel_plan_after == str(lru.kernel_plan)
        cuts = [sum(layer.spectrum[order:]) for order in range(3, 7)]  # three states hold three real ones to three pairs
        assert any(layer.discarded == pytest.approx(cut / sum(layer.spectrum)) for cut in cuts)
        assert layer.error_bound == pytest.approx(2 * layer.discarded * sum(layer.spectrum))
        oracle = run.model.get_submodule(layer.name)
        again = compressm.adapters.LRUAdapter().read(oracle).hankel_singular_values()
        assert layer.spectrum_after == pytest.approx(again.tolist(), rel=1e-4, abs=1e-6 * layer.spectrum[0])
    for text in (str(report), caplog.text):
        assert "8 -> 3 states" in text
        assert "of the sum of the real data-free spectrum cut" in text
    assert "attempt 1 of 1, FixedRank(states=3), recipe default" in report.reason
    json.dumps(report.to_dict())
    assert type(report).from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_reports_say_the_bytes_of_state(training, caplog):
    run = training(ranks=(8, 6))
    compressor = compressor_of(run, compressm.FixedRank({"lrus.0": 3}), compressm.At([1, 2]))
    plan = compressor.plan()
    assert (plan.state_bytes_before, plan.state_bytes_after) == (16 * 14, 16 * 9)
    assert str(plan).splitlines()[-1] == "224 -> 144 bytes of state per sequence"
    with caplog.at_level(logging.INFO, "compressm"):
        report = compressor.step()
    assert [(layer.state_bytes_before, layer.state_bytes_after) for layer in report.layers] == [(128, 48), (96, 96)]
    assert sum(lru.initial_state(1).nbytes for lru in run.model.lrus) == report.state_bytes_after == 144
    assert "; 224 -> 144 bytes of state per sequence (" in str(report).splitlines()[0]
    assert "; 224 -> 144 bytes of state per sequence (" in caplog.text
    assert "; 144 bytes of state per sequence (" in str(compressor.step())
    data = json.loads(json.dumps(report.to_dict()))
    assert (data["state_bytes_before"], data["state_bytes_after"]) == (224, 144)
    assert (plan.to_dict()["state_bytes_before"], plan.to_dict()["state_bytes_after"]) == (224, 144)


def test_histories_that_do_not_know_the_bytes_still_load(training):
    run = training()
    compressor = compressor_of(run)
    compressor.step()
    state = json.loads(json.dumps(compressor.state_dict()))
    for part in (state["history"][0], *state["history"][0]["layers"]):
        del part["state_bytes_before"], part["state_bytes_after"]
    compressor.load_state_dict(state)
    (report,) = compressor.history
    assert report.state_bytes_before is report.state_bytes_after is report.layers[0].state_bytes_after is None
    assert "bytes" not in str(report)
    assert type(report).from_dict(report.to_dict()) == report


def test_kernel_changes_are_told(training):
    """A plan that differs after the cut: C++ or triton tiles depend on N, here the layer's own answer does."""

    class Planned(LRU):
        @property
        def kernel_plan(self):
            return f"tile {self.d_state}"

    run = training(ranks=(8,))
    lru = Planned(4, 8, dtype=torch.float64)
    lru.load_state_dict(run.model.lrus[0].state_dict())
    run.model.lrus[0] = lru
    report = compressm.compress(run.model, compressm.FixedRank(3))
    assert (report.layers[0].kernel_plan_before, report.layers[0].kernel_plan_after) == ("tile 8", "tile 3")
    assert "kernel tile 8 -> tile 3" in str(report)


def test_paper_recipe(training):
    run = training(ranks=(12, 9))
    window = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    moments = {name: run.optimizer.state[p]["exp_avg"].clone() for name, p in run.model.named_parameters()}
    adapter = compressm.adapters.LRUAdapter()
    systems = {f"lrus.{i}": adapter.read(lru) for i, lru in enumerate(run.model.lrus)}
    compressor = compressor_of(run, compressm.Energy(tau=0.05), compressm.Warmup(40), recipe="paper")
    report = compressor.step()
    assert report.changed
    for layer in report.layers:
        assert layer.convention == "complex"
        assert len(layer.spectrum) == layer.rank_before
        if layer.changed:
            oracle = systems[layer.name].truncate(layer.rank_after, "complex").impulse_response(30).real
            lru = run.model.get_submodule(layer.name)
            response = adapter.read(lru).impulse_response(30).real
            assert float((response - oracle).norm() / oracle.norm()) < 1e-10
            for key in NAMES:
                held = run.optimizer.state[lru.get_parameter(key)]["exp_avg"]
                sliced = moments[f"{layer.name}.{key}"][tuple(slice(0, size) for size in held.shape)]
                assert torch.equal(held, sliced)
    assert [compressor.step() is None for _ in range(4)] == [False] * 3 + [True]
    assert len(compressor.history) == 4
    assert run.model.encoder.weight is not window["encoder.weight"]


@pytest.mark.parametrize(
    ("schedule", "due"),
    [
        (compressm.Once(10, at=0.3), [3]),
        (compressm.Warmup(20, fraction=0.2), [1, 2, 3, 4]),
        (compressm.Every(2, 3, 7), [3, 5, 7]),
        (compressm.At([5, 2]), [2, 5]),
    ],
)
def test_schedules_decide(training, schedule, due):
    run = training(ranks=(8, 8))
    compressor = compressor_of(run, compressm.Shrink(0.2), schedule)
    done = [step for step in range(1, 11) if compressor.step() is not None]
    assert done == due
    assert [report.step for report in compressor.history] == due
    assert run.model.lrus[0].d_state < 8


def test_attempts_share_one_tau(training):
    """What four attempts keep together is what tau allows once; the paper's recipe compounds."""
    kept = {}
    for recipe in ("default", "paper"):
        torch.manual_seed(3)
        run = training(ranks=(24, 24))
        compressor = compressor_of(run, compressm.Energy(tau=0.2, gate=1.0), compressm.Every(1, 1, 4), recipe=recipe)
        for _ in range(4):
            compressor.step()
        kept[recipe] = compressor.state_dict()["kept"]
    assert all(0.8 - 1e-9 <= value < 0.95 for value in kept["default"].values())
    assert all(value < 0.7 for value in kept["paper"].values())


def test_an_attempt_that_changed_nothing_leaves_its_share_to_the_next():
    kept = {"lrus.0": 1.0, "lrus.1": 1.0}
    assert Progress(kept=kept).shares(0.7, attempts=2) == pytest.approx(dict.fromkeys(kept, 0.7**0.5))
    assert Progress(attempts=1, kept=kept).shares(0.7, attempts=2) == pytest.approx(dict.fromkeys(kept, 0.7))
    assert Progress(attempts=1, kept={**kept, "lrus.0": 0.6}).shares(0.7, attempts=2)["lrus.0"] == 1.0


def test_resumes_in_mid_schedule_bit_for_bit(training):
    torch.manual_seed(5)
    whole = training(ranks=(12, 9), steps=0)
    schedule, policy = compressm.At([2, 4]), compressm.Energy(tau=0.3, gate=1.0)
    one = compressor_of(whole, policy, schedule)
    for _ in range(3):
        whole.step()
        one.step()
    saved = json.loads(json.dumps(one.state_dict()))
    part = copy.deepcopy(whole)
    two = compressor_of(part, policy, schedule)
    two.load_state_dict(saved)
    assert two.step_count == 3
    assert two.history == one.history
    for run, compressor in ((whole, one), (part, two)):
        torch.manual_seed(9)
        for _ in range(3):
            run.step()
            compressor.step()
    assert one.ranks == two.ranks
    assert [report.step for report in two.history] == [2, 4]
    assert two.state_dict()["kept"] == one.state_dict()["kept"]
    for (name, left), right in zip(whole.model.state_dict().items(), part.model.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


def test_several_optimizers(training):
    run = training(steps=0)
    run.optimizer = None
    split = [list(part.parameters()) for part in (run.model.encoder, run.model.lrus[0], run.model.lrus[1])]
    optimizers = [torch.optim.SGD(split[0], lr=0.1), torch.optim.Adam(split[1]), torch.optim.AdamW(split[2])]
    compressor = compressm.Compressor(run.model, optimizers, policy=compressm.FixedRank(2), schedule=compressm.At([1]))
    run.model(run.batch()[0]).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    compressor.step()
    assert [tuple(o.param_groups[0]["params"][0].shape) for o in optimizers] == [(4, 2), (2,), (2,)]


def test_ema_follows(training):
    run = training()
    averaged = AveragedModel(run.model)
    averaged.update_parameters(run.model)
    compressor = compressor_of(run, ema=averaged, schedule=compressm.At([1, 2]), policy=compressm.Shrink(0.3))
    for _ in range(2):
        run.step()
        averaged.update_parameters(run.model)
        compressor.step()
        assert [lru.d_state for lru in averaged.module.lrus] == [lru.d_state for lru in run.model.lrus]
    x = run.batch()[0]
    assert torch.isfinite(averaged(x)).all()


def test_compiled_model(training):
    """torch.compile's wrapper is looked through, and the compiled model runs on after the cut."""
    run = training()
    compiled = torch.compile(run.model, backend="eager")
    x = run.batch()[0]
    with torch.no_grad():
        compiled.eval()(x)
    compressor = compressm.Compressor(
        compiled, run.optimizer, policy=compressm.FixedRank(3), schedule=compressm.At([1]), calibration=[x]
    )
    assert list(compressor.ranks) == ["lrus.0", "lrus.1"]
    compressor.step()
    with torch.no_grad():
        assert torch.allclose(compiled(x), run.model.eval()(x), rtol=1e-12)
    run.model.train()
    compiled.train()(x).sum().backward()
    assert run.model.lrus[0].B_re.grad.shape == (3, 4)


def test_threads_are_as_before(training):
    before = torch.get_num_threads()
    run = training()
    compressor_of(run).step()
    assert torch.get_num_threads() == before
    with torch.no_grad():
        run.model.lrus[0].nu_log[0] = float("inf")
    with pytest.raises(NumericalError):
        compressm.inspect(run.model)
    assert torch.get_num_threads() == before


def test_one_shot(training, snapshot):
    run = training(ranks=(10, 7))
    x = run.batch(16)[0]
    run.model.eval()
    full = run.model(x).detach()
    errors = {}
    for calibration in (None, [x]):
        model = copy.deepcopy(run.model)
        report = compressm.compress(model, compressm.FixedRank(2), calibration=calibration)
        assert report.step == 0
        assert "one-shot" in report.reason
        assert [lru.d_state for lru in model.lrus] == [2, 2]
        errors[calibration is None] = float((model(x) - full).detach().norm())
    assert errors[False] < errors[True]
    before = snapshot(run.model, run.optimizer)
    report = compressm.compress(run.model, compressm.Energy(tau=0), optimizer=run.optimizer)
    assert not report.changed
    assert "2 of 2 layers left alone" in report.reason
    before.check()
    compressm.compress(run.model, compressm.FixedRank(2), optimizer=run.optimizer, moments="reset", recipe="paper")
    run.step()


def test_truncation_costs_no_more_than_its_bound(training):
    """The function itself: each layer's output error against 2 sum(tail) times its input, in the 2-norm over time."""
    run = training(ranks=(16,))
    lru, x = run.model.lrus[0], torch.randn(3, 200, 4, dtype=torch.float64)
    x[:, 100:] = 0  # the response dies out within the window
    full = lru(x).detach()
    report = compressm.compress(run.model, compressm.FixedRank(6), optimizer=run.optimizer).layers[0]
    error = float((lru(x) - full).detach().norm() / x.norm())
    assert 1e-6 < error <= report.error_bound


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_two_layers_of_384_states(recipe):
    """End to end at the size of a real model: spectrum, cut, moments, and the next training step."""
    model = nn.Sequential(*(LRU(512, 384) for _ in range(2)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x = torch.randn(2, 20, 512)

    def train_step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    train_step()
    compressor = compressm.Compressor(
        model, optimizer, policy=compressm.Energy(tau=0.1), schedule=compressm.At([1]), recipe=recipe, multiple_of=8
    )
    report = compressor.step()
    for layer in report.layers:
        assert 0 < layer.discarded <= 0.1
        assert layer.rank_after % 8 == 0
        assert layer.rank_after < 330
        assert layer.method == "balanced"
    train_step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
