"""What one addition costs: a method, a dataset, a model, an objective, each in a few lines and found by its name."""

from __future__ import annotations

import ast
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from experiments.cli_cases import run, timeless
from experiments.report_cases import printed
from experiments.silent import Silent
from pydantic import Field
from torch import nn

import compressm
from compressm import cli, experiments
from compressm.errors import ArgumentError, CheckpointError, ConfigError
from compressm.experiments import restoring
from compressm.experiments.methods import METHODS
from compressm.experiments.methods.base import Look, Method
from compressm.experiments.methods.compressed import Compressed
from compressm.experiments.registry import Registry
from compressm.experiments.reports import plots
from compressm.experiments.reports.data import parse_report
from compressm.experiments.reports.summary import headline
from compressm.experiments.settings import resolve
from compressm.experiments.tasks.datasets import DATASETS
from compressm.experiments.tasks.datasets.sequences import Sequences
from compressm.experiments.tasks.models import MODELS
from compressm.experiments.tasks.models.lru import Lru
from compressm.experiments.tasks.objectives import OBJECTIVES
from compressm.experiments.tasks.objectives.classification import Classification
from compressm.experiments.tasks.parts import Dataset, Outcome
from compressm.experiments.tasks.presets import PRESETS
from compressm.experiments.tasks.settings import Settings
from compressm.experiments.tasks.task import make_task
from compressm.experiments.training import TrainingRun

TINY = {"steps": 20, "batch_size": 16, "d_state": 8, "d_model": 4, "eval_every": 10, "log_every": 5, "timing_rounds": 2}


def assigned(**values):
    return [part for key, value in {**TINY, **values}.items() for part in ("--set", f"{key}={json.dumps(value)}")]


@dataclass
class Sums:
    """What the penalised run keeps."""

    steps: int = 0
    penalties: float = 0.0

    def state_dict(self):
        return asdict(self)

    def load_state_dict(self, state):
        self.steps, self.penalties = state["steps"], state["penalties"]


class PenalisedSettings(Settings):
    penalty: float = Field(0.1, ge=0)


class Penalised(Method):
    """Full size; the squares of C are added to the loss."""

    name = "penalised"
    title = "full size, small C"
    phrase = "the run with a penalty on C"
    look = Look("#8a6d00", "#e3c34a", line=(0, (6, 2)), marker="s", layer=3.2)
    Settings = PenalisedSettings

    def state(self, run, finished):
        return Sums()

    def loss(self, run, outcome):
        readouts = [p for name, p in run.model.named_parameters() if name.rpartition(".")[2] in ("C_re", "C_im")]
        penalty = sum(p.square().sum() for p in readouts)
        run.state.steps += 1
        run.state.penalties += float(penalty.detach())
        return run.settings.penalty * penalty


class NoiseSettings(Settings):
    examples: int = Field(64, ge=16)


class Noise(Dataset):
    """Loud and quiet noise."""

    name = "noise"
    Settings = NoiseSettings
    gives = Sequences
    model = "lru"
    objective = "classification"
    at_hand = True

    def load(self, folder):
        generator = torch.Generator().manual_seed(0)
        y = torch.arange(self.settings.examples) % 2
        loud = torch.randint(0, 256, (len(y), 24, 1), generator=generator, dtype=torch.uint8)
        x = torch.where(y[:, None, None] == 1, loud, loud // 8)
        return Sequences("loud and quiet", x, y, x, y, 2)


@pytest.fixture
def registered():
    """Registers items for one test."""
    added = []

    def add(registry, item):
        registry.register(item)
        added.append((registry, item.name))

    yield add
    for registry, name in added:
        del registry[name]


def make(method, path, finished=(), **overrides):
    settings = resolve("digits", {**TINY, **overrides})
    return TrainingRun(METHODS[method], make_task(settings, None, torch.device("cpu")), path, finished)


def readout(run):
    return sum(float(p.detach().square().sum()) for name, p in run.model.named_parameters() if ".C_" in name)


def test_a_method_trains_next_to_the_others_and_is_reported(registered, tmp_path):
    registered(METHODS, Penalised())
    out = tmp_path / "out"
    runs = ["compressed", "penalised", "full"]
    result = run("train", "digits", "--out", out, *assigned(runs=runs, penalty=0.5))
    assert result.exit_code == 0
    table = " ".join(result.output.split())
    assert "full size, small C: 20 steps" in table
    assert "the run with a penalty on C" in table  # the headline compares with it
    data = json.loads((out / "report.json").read_text())
    assert [entry["name"] for entry in data["runs"]] == runs
    assert data["config"]["penalty"] == 0.5
    assert {step["name"] for step in data["timing"]["steps"]} == set(runs)
    report = parse_report(data)
    assert "Full size, small C" in printed(report)
    assert report.reference.name == "full"
    assert report.main.name == "compressed"
    assert headline(report).index("the full-size run") < headline(report).index("the run with a penalty on C")
    for picture in (plots.loss(report), plots.score(report), plots.states(report), plots.step_time(report)):
        assert "var(--run-penalised, #8a6d00)" in picture.svg
        assert "Full size, small C" in picture.svg
    page = (out / "report.html").read_text()
    assert "--run-penalised: #8a6d00" in page
    assert "--run-penalised: #e3c34a" in page
    assert '<span class="swatch run-penalised"></span>Full size, small C' in page
    assert 'swatch run-other"' not in page


def test_the_loss_of_a_method_is_trained_and_not_shown(registered, tmp_path):
    registered(METHODS, Penalised())
    runs = {}
    for name, penalty in (("full", 0.1), ("penalised", 0.0), ("penalised", 0.5)):
        runs[name, penalty] = make(name, tmp_path / "x", penalty=penalty, log_every=1)
        assert runs[name, penalty].train(Silent(), lambda: False)
    full, none, much = runs.values()
    assert all(torch.equal(a, b) for a, b in zip(full.model.parameters(), none.model.parameters(), strict=True))
    assert readout(much) < 0.9 * readout(full)
    assert much.record.curve[0]["loss"] == full.record.curve[0]["loss"]
    assert much.record.curve[-1]["loss"] != full.record.curve[-1]["loss"]


def test_the_state_of_a_method_lies_in_its_checkpoint(registered, tmp_path):
    registered(METHODS, Penalised())
    whole, part = make("penalised", tmp_path / "whole"), make("penalised", tmp_path / "part")
    assert whole.train(Silent(), lambda: False)
    assert not part.train(Silent(), lambda: part.record.step == 7)
    rest = make("penalised", tmp_path / "part")
    rest.restore()
    assert rest.state == part.state
    assert rest.train(Silent(), lambda: False)
    assert rest.state == whole.state
    assert rest.state.steps == 20
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True))
    part.state = None
    part.save()
    with pytest.raises(CheckpointError, match="expected a checkpoint of the run 'penalised'"):
        make("penalised", tmp_path / "part").restore()


def test_a_rollback_sets_the_state_of_a_method_back(registered, tmp_path):
    class Counted(Compressed):
        name = "counted"
        title = "compressed and counted"

        def state(self, run, finished):
            return Sums()

        def loss(self, run, outcome):
            run.state.steps += 1

        def compressor(self, run):
            values = [1.0, 2.0, 1.0, 1.0]
            guard = compressm.Rollback(lambda model: values.pop(0) if len(values) > 1 else values[0], jump=None, recovery=5)
            schedule = compressm.Once(run.settings.steps, at=0.5)
            return compressm.Compressor(
                run.model, run.optimizer, policy=compressm.FixedRank(5), schedule=schedule, guard=guard
            )

    registered(METHODS, Counted())
    counted = make("counted", tmp_path / "x", runs=["counted"])
    assert counted.train(Silent(), lambda: False)
    assert [verdict["outcome"] for verdict in counted.record.verdicts] == ["rolled back", "accepted"]
    assert counted.state.steps == 20


def test_a_method_may_start_from_another_size_and_what_ran_before_it(registered, tmp_path):
    class Student(Method):
        """Two channels, taught by the model that was trained before it."""

        name = "student"
        title = "two channels"
        phrase = "the student"
        reduced = True

        def replaced(self, settings):
            return {"d_model": 2}

        def states(self, task, finished):
            return [3] * task.settings.blocks

        def state(self, run, finished):
            run.teacher = next(other.model for other in finished if other.name == "full")

        def loss(self, run, outcome):
            with torch.no_grad():
                taught = run.teacher(outcome.batch[0]).softmax(-1)
            return nn.functional.cross_entropy(outcome.scores, taught)

    registered(METHODS, Student())
    out = tmp_path / "out"
    assert run("train", "digits", "--out", out, *assigned(runs=["full", "student"])).exit_code == 0
    report = parse_report(json.loads((out / "report.json").read_text()))
    assert report.run("student").final_states == (3, 3)
    model, _ = restoring.restore_model(out / "student.safetensors")
    assert model.encoder.out_features == 2
    alone = make("full", tmp_path / "a")
    assert alone.train(Silent(), lambda: False)
    taught = make("student", tmp_path / "b", [alone], runs=["full", "student"])
    before = taught.model.decoder.weight.clone()
    taught.train_step()
    assert not torch.equal(taught.model.decoder.weight, before)


def test_a_dataset_trains_with_the_model_and_objective_that_are_there(registered, monkeypatch, tmp_path):
    registered(DATASETS, Noise)
    preset = {**TINY, "title": "Loud or quiet", "dataset": "noise", "runs": ("compressed", "full"), "blocks": 1, "lr": 0.01}
    monkeypatch.setitem(PRESETS, "noise", {**preset, "steps": 60})
    out = tmp_path / "out"
    result = run("train", "noise", "--out", out, "--set", "examples=32")
    assert result.exit_code == 0
    data = json.loads((out / "report.json").read_text())
    assert (data["config"]["model"], data["config"]["objective"]) == ("lru", "classification")
    assert data["dataset"] == {"name": "loud and quiet", "train": 32, "test": 32, "length": 24, "channels": 1, "classes": 2}
    assert data["runs"][1]["final"]["accuracy"] > 0.9
    found = json.loads(run("inspect", out / "full.safetensors", "--json").output)
    assert [layer["states"] for layer in found["layers"]] == [8]
    before = timeless(data)
    assert run("train", "noise", "--out", out, "--resume").exit_code == 0
    assert timeless(json.loads((out / "report.json").read_text())) == before
    with pytest.raises(ConfigError, match=r"examples has no meaning for the dataset 'digits', expected one of .*tau"):
        resolve("digits", {"examples": 32})
    with pytest.raises(ConfigError, match="examples: got 3"):
        resolve("noise", {"examples": 3})


def test_a_model_and_an_objective_are_chosen_by_name(registered, tmp_path):
    class Plain(Lru):
        """Without dropout; how small it will be is known."""

        name = "plain"

        def build(self, data, states):
            model = super().build(data, states)
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            return model

        def small_states(self):
            return [3] * self.settings.blocks

    class SmoothedSettings(Settings):
        smoothing: float = Field(0.1, ge=0, lt=1)

    class Smoothed(Classification):
        """Cross-entropy with smoothed labels."""

        name = "smoothed"
        Settings = SmoothedSettings

        def outcome(self, model, batch):
            plain = super().outcome(model, batch)
            loss = nn.functional.cross_entropy(plain.scores, batch[1], label_smoothing=self.settings.smoothing)
            return Outcome(batch, plain.scores, loss, plain.tally)

    registered(MODELS, Plain)
    registered(OBJECTIVES, Smoothed)
    chosen = {"model": "plain", "objective": "smoothed", "smoothing": 0.3, "runs": ["small", "full"]}
    assert run("train", "digits", "--out", tmp_path, *assigned(**chosen)).exit_code == 0  # small needs no compressed run
    report = parse_report(json.loads((tmp_path / "report.json").read_text()))
    assert [entry.final_states for entry in report.runs] == [(3, 3), (8, 8)]
    smoothed, usual = make("full", tmp_path / "a", **chosen), make("full", tmp_path / "b")
    assert {block.dropout.p for block in smoothed.model.blocks} == {0.0}
    assert {block.dropout.p for block in usual.model.blocks} == {0.1}
    for each in (smoothed, usual):
        each.train_step()
    assert smoothed._recent.take()[0] != usual._recent.take()[0]


def fitting():
    """Methods for the digits, whose LRU has neither maps nor rows, and which classify."""
    rows = {"drrqr", "ghost", "output_energy", "taylor"}
    other = {"small_projected", "subspace", "compressed_strict", *rows, *(f"after_{name}" for name in rows)}
    return [name for name in METHODS if name not in other]


def test_wrong_names_are_answered_with_the_right_ones(registered):
    for overrides, words in (
        ({"dataset": "digit"}, rf"dataset: got 'digit' \(did you mean 'digits'\?\), expected one of {', '.join(DATASETS)}$"),
        ({"dataset": ["digits"]}, r"dataset: got .*expected one of digits"),
        ({"model": "lur"}, rf"model: got 'lur' \(did you mean 'lru'\?\), expected one of {', '.join(MODELS)}$"),
        ({"objective": "x"}, rf"objective: got 'x', expected one of {', '.join(OBJECTIVES)}$"),
        ({"model": "mamba"}, r"model: 'mamba' reads tokens, the dataset 'digits' gives .*; expected one of lru$"),
        ({"objective": "next_byte"}, r"objective: 'next_byte' reads bytes of text.*expected one of classification$"),
        ({"runs": ["smal"]}, rf"runs: got 'smal' \(did you mean 'small'\?\), expected one of {', '.join(fitting())}$"),
        ({"runs": ["full", "full"]}, "runs must differ"),
        ({"runs": []}, "runs: got "),
    ):
        with pytest.raises(ConfigError, match=words):
            resolve("digits", overrides)
    with pytest.raises(ConfigError, match=r"'small_narrow' changes .*'mamba'.*; expected one of compressed, .*full"):
        resolve("stdlib-lm", {"runs": ["small_narrow"]})
    registered(METHODS, Penalised())
    with pytest.raises(ConfigError, match=f"expected one of {', '.join(fitting())}$"):
        resolve("digits", {"runs": ["nothing"]})
    assert "penalty" not in resolve("digits", {}).to_dict()
    assert resolve("digits", {"runs": ["penalised"]}).to_dict()["penalty"] == 0.1


def test_wrong_registrations_are_refused(registered):
    registry = Registry("method", Penalised())
    with pytest.raises(ArgumentError, match=r"method: name: expected none of penalised, got 'penalised'"):
        registry.register(Penalised())
    for name in ("Two Words", "../up", "", None):
        with pytest.raises(ArgumentError, match="lower-case letters"):
            registry.register(type("Odd", (Method,), {"name": name})())
    with pytest.raises(ArgumentError, match=r"colour: expected a colour like .*, got 'red'"):
        Look("red", "#000000")

    class Twice(Settings):
        tau: float = 0.5

    registered(METHODS, type("Rival", (Method,), {"name": "rival", "Settings": Twice})())
    with pytest.raises(ConfigError, match="the key 'tau' is declared by 'lru' and by 'rival'"):
        resolve("digits", {})


def test_methods_are_named_in_their_room_and_in_presets_alone():
    room = Path(experiments.__file__).parent
    seen = 0
    for path in (*room.rglob("*.py"), Path(cli.__file__)):
        if path.parent != room / "methods" and path.name != "presets.py":
            seen += 1
            constants = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
            assert not constants & set(METHODS), path
    assert seen > 20
