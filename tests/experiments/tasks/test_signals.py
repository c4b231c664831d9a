"""System identification: the true system, its signals, the error in decibels."""

from __future__ import annotations

import json
import math

import pytest
import torch
from experiments.cli_cases import run

from compressm.adapters import LRUAdapter
from compressm.errors import ConfigError, DataError
from compressm.experiments.settings import resolve
from compressm.experiments.tasks.datasets import DATASETS
from compressm.experiments.tasks.datasets.signals import SEED, true_system
from compressm.experiments.tasks.datasets.texts import Text
from compressm.experiments.tasks.objectives.regression import decibels
from compressm.experiments.tasks.parts import Data
from compressm.experiments.tasks.task import make_task

TINY = {
    "steps": 8, "batch_size": 4, "d_state": 7, "rank": 3, "sequences": 30, "length": 21, "eval_every": 4, "log_every": 4,
    "timing_rounds": 1, "calibration_sequences": 4,
}  # fmt: skip


def load(**overrides):
    settings = resolve("sysid", {**TINY, **overrides})
    return DATASETS["sysid"](settings).load(None)


def test_outputs_are_those_of_a_stable_system_of_the_true_order():
    data, settings = load(noise=0.0), resolve("sysid", {**TINY, "noise": 0.0})
    truth = true_system(settings, torch.Generator().manual_seed(SEED))
    system = LRUAdapter().read(truth)
    assert system.order == 8
    modulus, phase = system.log_lam.real.exp(), system.log_lam.imag
    assert 0.9 <= float(modulus.min()) <= float(modulus.max()) <= 0.99
    assert 0 < float(phase.min()) <= float(phase.max()) <= math.pi
    response = system.impulse_response(21).real.float()
    for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        expected = torch.stack([sum(x[:, t - s] @ response[s].T for s in range(t + 1)) for t in range(21)], 1)
        scale = float((y * expected).sum() / expected.square().sum())
        torch.testing.assert_close(y, scale * expected, rtol=1e-4, atol=1e-4)
    assert 0.5 < float(data.test_y.std()) < 2


def test_noise_is_in_the_training_outputs_alone():
    clean, noisy = load(noise=0.0), load(noise=0.3)
    assert torch.equal(clean.train_x, noisy.train_x)
    assert torch.equal(clean.test_y, noisy.test_y)
    assert abs(float((noisy.train_y - clean.train_y).std()) - 0.3) < 0.02


def test_every_seed_has_a_system_of_its_own():
    assert torch.equal(load(seed=1).test_y, load(seed=1).test_y)
    assert not torch.equal(load(seed=1).test_y, load(seed=2).test_y)


def test_the_error_is_relative_and_in_decibels():
    task = make_task(resolve("sysid", TINY), None, torch.device("cpu"))
    power = float(task.data.test_y.double().square().mean())

    class Scaled(torch.nn.Module):
        """Answers with part of the truth."""

        def forward(self, x):
            return 0.9 * task.data.test_y[: len(x)]

    found = task.objective.evaluate(Scaled(), "test")
    assert math.isclose(found["error_db"], -20.0, abs_tol=1e-4)
    assert math.isclose(found["loss"], 0.01 * power, rel_tol=1e-5)
    assert decibels(0.0) == -300.0
    model = task.build_model([3])
    outcome = task.objective.outcome(model, task.objective.batches[0])
    assert math.isclose(task.objective.from_tally(3 * outcome.tally.item(), 3), 10 * math.log10(outcome.loss.item()))


def test_train_and_inspect(tmp_path):
    sizes = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    result = run("train", "sysid", "--out", tmp_path, "--set", 'runs=["compressed","full"]', *sizes)
    assert result.exit_code == 0
    assert "dB" in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert [entry["final"]["states"] for entry in report["runs"]] == [{"blocks.0.lru": 3}, {"blocks.0.lru": 7}]
    found = json.loads(run("inspect", tmp_path / "compressed.safetensors", "--json").output)
    assert [layer["states"] for layer in found["layers"]] == [3]


def test_wrong_input(tmp_path):
    with pytest.raises(DataError, match="expected no folder, as 'sysid' is drawn at random"):
        DATASETS["sysid"](resolve("sysid", TINY)).load(tmp_path)
    with pytest.raises(ConfigError, match="rank = 7 must be below d_state = 7"):
        resolve("sysid", {**TINY, "rank": 7})
    with pytest.raises(DataError, match="expected at least 6 to hold some out"):
        load(sequences=5).held_out()


def test_what_is_held_out_of_text_is_its_validation_part():
    parts = {name: torch.tensor([number], dtype=torch.uint8) for number, name in enumerate(("train", "validation", "test"))}
    held = Text("text", parts, 1, "").held_out()
    assert [int(part) for part in held.splits.values()] == [0, 1, 1]


def test_data_without_a_part_to_tune_on_say_so():
    class Other(Data):
        kind = "other things"

        def to(self, device):
            return self

        def describe(self):
            return {}

    with pytest.raises(DataError, match=r"--tune: other things have no part to tune on \(no Other.held_out\)"):
        Other().held_out()
