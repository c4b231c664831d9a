"""Associative recall: what is drawn and judged, its runs, and the models of tokens that it compares."""

from __future__ import annotations

import json
import math

import pytest
import torch
from experiments.cli_cases import run, timeless
from experiments.silent import Silent
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compressm.errors import ConfigError, DataError
from compressm.experiments.methods import METHODS
from compressm.experiments.restoring import restore_model
from compressm.experiments.settings import resolve
from compressm.experiments.tasks.datasets.drawn import NOT_ASKED
from compressm.experiments.tasks.datasets.recall import Associations
from compressm.experiments.tasks.task import make_task
from compressm.experiments.training import TrainingRun

CPU = torch.device("cpu")
TINY = {
    "steps": 8, "blocks": 1, "d_model": 8, "d_state": 8, "headdim": 4, "rank": 3, "pairs": 2, "keys": 5, "values": 3,
    "length": 9, "batch_size": 4, "test_sequences": 16, "eval_every": 3, "log_every": 2, "calibration_sequences": 6,
    "reduce_until": 0.5, "timing_rounds": 1,
}  # fmt: skip


class Oracle(nn.Module):
    """Knows the value of every key that it has seen in front of it; says ``other`` where none is asked for."""

    def __init__(self, data, other=0):
        super().__init__()
        self.data, self.other = data, other

    def forward(self, tokens):
        said = torch.full_like(tokens, self.other)
        for row, sequence in enumerate(tokens.tolist()):
            seen = {}
            for place, token in enumerate(sequence):
                if token in seen:
                    said[row, place] = seen[token]
                elif place < 2 * self.data.pairs and place % 2 == 0:
                    seen[token] = sequence[place + 1]
        return 100.0 * nn.functional.one_hot(said, self.data.vocabulary)


def task(**overrides):
    return make_task(resolve("recall", {**TINY, **overrides}), None, CPU)


@pytest.fixture
def make(tmp_path):
    def build(name, file="run", finished=(), **overrides):
        return TrainingRun(METHODS[name], task(**overrides), tmp_path / f"{file}.safetensors", finished)

    return build


def finished(made):
    assert made.train(Silent(), lambda: False)
    return made


@given(
    pairs=st.integers(1, 5), more_keys=st.integers(0, 4), values=st.integers(2, 5), room=st.integers(0, 4),
    count=st.integers(1, 3), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_every_key_is_asked_once_and_its_value_is_the_answer(pairs, more_keys, values, room, count, seed):
    data = Associations("x", 3 * pairs + room, CPU, pairs, pairs + more_keys, values)
    tokens, answers = data.draw(count, seed)
    assert tokens.shape == answers.shape == (count, data.length)
    assert tokens.dtype == answers.dtype == torch.int64
    for sequence, answer in zip(tokens.tolist(), answers.tolist(), strict=True):
        told = dict(zip(sequence[: 2 * pairs : 2], sequence[1 : 2 * pairs : 2], strict=True))
        assert len(told) == pairs
        assert all(1 <= key <= data.keys < value < data.vocabulary for key, value in told.items())
        assert sorted(filter(None, sequence[2 * pairs :])) == sorted(told)
        assert answer == [NOT_ASKED] * 2 * pairs + [told.get(token, NOT_ASKED) for token in sequence[2 * pairs :]]
    again = data.draw(count, seed)
    assert torch.equal(tokens, again[0])
    assert torch.equal(answers, again[1])


def test_keys_values_and_places_are_drawn_evenly():
    data = Associations("x", 9, CPU, 2, 3, 2)
    tokens, answers = data.draw(3000, 0)
    for place in (0, 2):
        assert (tokens[:, place].bincount(minlength=6)[1:4] / 3000 - 1 / 3).abs().max() < 0.05
        assert abs(float((tokens[:, place + 1] == 4).double().mean()) - 1 / 2) < 0.05
    assert ((answers[:, 4:] != NOT_ASKED).double().mean(0) - 2 / 5).abs().max() < 0.05
    first = (tokens[:, 4:] == tokens[:, :1]).double().argmax(1)
    second = (tokens[:, 4:] == tokens[:, 2:3]).double().argmax(1)
    assert abs(float((first < second).double().mean()) - 1 / 2) < 0.05  # not in the order of the pairs


def test_splits_and_steps_and_seeds_differ_and_are_reproduced():
    objectives = [task(seed=seed, pairs=4, keys=20, values=20, length=12).objective for seed in (0, 1)]
    rows = [(seed, row) for seed, one in enumerate(objectives) for step in range(5) for row in one.batches[step][0].tolist()]
    rows += [("calibration", row) for one in objectives for part in one.batches.calibration(16) for row in part.tolist()]
    rows += [("test", row) for row in objectives[0].test[0].tolist()]
    assert len({tuple(row) for _, row in rows}) == len(rows) == 2 * 5 * 4 + 2 * 16 + 16
    assert torch.equal(objectives[0].test[0], objectives[1].test[0])  # seeds are judged on the same sequences
    again = task(seed=1, pairs=4, keys=20, values=20, length=12).objective
    for one, other in zip(again.batches[3], objectives[1].batches[3], strict=True):
        assert torch.equal(one, other)
    assert [len(part) for part in again.batches.calibration(6)] == [4, 2]


def test_accuracy_and_loss_count_what_is_asked_and_nothing_else():
    objective = task().objective
    batch = objective.batches[0]
    for other in (0, 6):
        outcome = objective.outcome(Oracle(objective.data, other), batch)
        assert float(outcome.loss) == 0
        assert objective.from_tally(float(outcome.tally), 1) == 1
        assert objective.evaluate(Oracle(objective.data, other), "test") == {"accuracy": 1.0, "loss": 0.0}
    undecided = Oracle(objective.data)
    undecided.forward = lambda tokens: torch.zeros(*tokens.shape, objective.data.vocabulary)
    assert objective.evaluate(undecided, "test") == {"accuracy": 0.0, "loss": pytest.approx(math.log(9))}


@pytest.mark.parametrize(("name", "stops"), [("compressed", (3, 4, 5)), ("small_projected", (4,))])
def test_a_run_stopped_anywhere_resumes_to_the_same_result(make, name, stops):
    whole = finished(make(name, "whole"))
    assert whole.model.states == [3]
    assert [cut["step"] for cut in whole.record.reductions] == [4] * (name == "compressed")
    for stop in stops:
        part = make(name, "part")
        assert not part.train(Silent(), lambda part=part, stop=stop: part.record.step >= stop)
        rest = make(name, "part")
        rest.restore()
        assert rest.record.step == stop
        finished(rest)
        assert timeless(rest.summary()) == timeless(whole.summary())
        for (key, a), b in zip(whole.model.named_parameters(), rest.model.parameters(), strict=True):
            assert torch.equal(a, b), (stop, key)


@pytest.mark.parametrize(
    ("options", "form", "features"),
    [
        ({}, "projected", 8), ({"form": "strict"}, "strict", 3), ({"d_features": 8}, "projected", 8),
        ({"d_features": 11}, "projected", 11),
    ],
)
def test_the_form_of_a_cut_is_chosen_and_reported(make, options, form, features):
    made = finished(make("compressed", **options))
    (cut,) = made.record.reductions
    assert [layer["method"].partition(",")[0] for layer in cut["layers"]] == [form]
    assert cut["layers"][0]["gramians"] == "data"
    layer = made.model.blocks[0].mamba2
    assert (layer.d_state, layer.conv1d.weight.shape[0]) == (3, layer.d_ssm + 2 * features)
    assert made.summary()["final"]["states"] == {"blocks.0.mamba2": 3}


def test_the_projected_control_has_the_features_of_full_size(make, tmp_path):
    made = make("small_projected")
    layer = made.model.blocks[0].mamba2
    assert (layer.d_state, layer.d_features) == (3, 8)
    maps = layer.B_map.detach().clone(), layer.C_map.detach().clone()
    made.train_step()
    assert not torch.equal(layer.B_map, maps[0])
    assert not torch.equal(layer.C_map, maps[1])
    made = finished(make("small_projected", "control"))
    model, calibration = restore_model(tmp_path / "control.safetensors")
    assert (model.blocks[0].mamba2.d_state, model.blocks[0].mamba2.d_features) == (3, 8)
    assert torch.equal(model(calibration[0]), made.model(calibration[0]))
    ended = finished(make("compressed", "first", rank=5))
    assert make("small_projected", "second", [ended]).model.states == [5]


def test_a_projected_control_is_refused_where_there_is_none():
    runs = {"runs": ["full", "small_projected"]}
    for preset in ("stdlib-lm", "digits"):
        words = r"'small_projected' has maps .* \(d_features\), the model '\w+' has none; expected one of compressed, .*full"
        with pytest.raises(ConfigError, match=words):
            resolve(preset, runs)
    assert resolve("stdlib-lm", {"model": "mamba2", **runs}).runs == ("full", "small_projected")
    with pytest.raises(ConfigError, match=r"with d_features = 64 .*, or run 'small' in the place of 'small_projected'"):
        resolve("recall", {"d_features": 64, **runs})


@pytest.mark.parametrize("model", ["mamba", "mamba2"])
def test_both_tasks_train_every_mixer(make, source_folder, tmp_path, model):
    sizes = {key: value for key, value in TINY.items() if key != "headdim" or model == "mamba2"}
    settings = resolve("recall", {**sizes, "model": model})
    recall = TrainingRun(METHODS["compressed"], make_task(settings, None, CPU), tmp_path / "a")
    own = {"pairs", "keys", "values", "test_sequences"}
    text = {key: value for key, value in sizes.items() if key not in own}
    settings = resolve("stdlib-lm", {**text, "model": model, "eval_bytes": 64})
    bytes_ = TrainingRun(METHODS["compressed"], make_task(settings, source_folder, CPU), tmp_path / "b")
    for made, vocabulary in ((recall, 9), (bytes_, 256)):
        assert finished(made).summary()["final"]["states"] == {f"blocks.0.{model}": 3}
        assert made.model(torch.zeros(1, 5, dtype=torch.int64)).shape == (1, 5, vocabulary)
        assert made.task.model.kernel_plan(9, CPU).op == {"mamba": "selective_scan", "mamba2": "ssd"}[model]
    assert recall.model.head.weight.shape == (9, 8)
    assert bytes_.model.head is None  # the projection is the embedding, transposed


def test_the_whole_command(tmp_path):
    out, runs = tmp_path / "out", ["compressed", "full", "small", "small_projected"]
    assigned = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    result = run("train", "recall", "--out", out, *assigned, "--set", f"runs={json.dumps(runs)}")
    assert result.exit_code == 0
    assert "projected, balanced pair" in " ".join(result.output.split())
    assert "small, projected architecture: 8 steps" in " ".join(result.output.split())
    data = json.loads((out / "report.json").read_text())
    assert [entry["name"] for entry in data["runs"]] == runs
    assert data["metric"] == "accuracy"
    assert data["dataset"] == {
        "name": "associative recall", "pairs": 2, "keys": 5, "values": 3, "length": 9, "vocabulary": 9, "test": 16
    }  # fmt: skip
    assert (data["config"]["model"], data["config"]["tied"], data["config"]["min_lr_ratio"]) == ("mamba2", False, 0.1)
    assert any("strict keeps a subset" in note for note in data["notes"])
    found = json.loads(run("inspect", out / "small_projected.safetensors", "--json").output)
    assert [(layer["name"], layer["states"]) for layer in found["layers"]] == [("blocks.0.mamba2", 3)]
    before = timeless(data)
    assert run("train", "recall", "--out", out, "--resume").exit_code == 0
    assert timeless(json.loads((out / "report.json").read_text())) == before
    with pytest.raises(DataError, match=r"--data-dir .*: expected no folder, as 'recall' is drawn at random"):
        run("train", "recall", "--out", tmp_path / "other", "--data-dir", tmp_path, *assigned)


def test_presets_are_the_published_setting():
    recall, text = resolve("recall", {}), resolve("stdlib-lm-mamba2", {})
    assert (recall.pairs, recall.keys, recall.values, recall.length, recall.batch_size) == (12, 31, 32, 40, 32)
    assert (recall.blocks, recall.d_model, recall.expand * recall.d_model // recall.headdim) == (2, 64, 2)
    assert (recall.d_state, recall.rank, recall.steps * recall.reduce_until, recall.steps) == (64, 8, 350, 800)
    assert (text.d_state, text.rank, text.expand * text.d_model // text.headdim) == (128, 16, 4)
    assert recall.runs == text.runs == ("compressed", "full", "small")


def test_wrong_settings_say_what_is_allowed():
    for overrides, words in (
        ({"pairs": 40}, "keys = 31 must be at least pairs = 40"),
        ({"length": 35}, r"length = 35 must be at least 3 \* pairs = 36"),
        ({"values": 1}, "values: got 1"),
        ({"headdim": 24}, r"headdim = 24 must divide expand \* d_model = 64"),
        ({"d_features": 32}, "d_features = 32 must be at least d_state = 64"),
        ({"rank": 64}, "rank = 64 must be below d_state = 64"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio: got 1.5"),
        ({"tau": 0.1}, "tau has no meaning for the dataset 'recall', expected one of .*d_features"),
        ({"model": "mamba", "headdim": 4}, "headdim has no meaning"),
        ({"model": "mamba3"}, r"did you mean 'mamba2?'\?\), expected one of lru, mamba, mamba2, gated_delta_net"),
        ({"d_features": 64, "form": "strict"}, "form = 'strict' does not go with d_features = 64"),
        ({"model": "gated_delta_net", "heads": 3}, r"heads = 3 must divide expand \* d_model = 64"),
        ({"model": "lru"}, "'lru' reads labelled sequences of pixels, the dataset 'recall' gives pairs of keys and values"),
        ({"objective": "next_byte"}, "objective: 'next_byte' reads bytes of text.*expected one of answers"),
        ({"pair": 3}, r"unknown key 'pair' \(did you mean 'pairs'\?\)"),
    ):
        with pytest.raises(ConfigError, match=words):
            resolve("recall", overrides)


@pytest.mark.parametrize("form", ["strict", "projected"])
def test_gated_delta_net_shrinks_and_is_restored(form, tmp_path):
    options = {key: value for key, value in TINY.items() if key != "headdim"}
    made_task = make_task(resolve("recall", {**options, "model": "gated_delta_net", "form": form}), None, CPU)
    made = finished(TrainingRun(METHODS["compressed"], made_task, tmp_path / "run.safetensors", ()))
    (cut,) = made.record.reductions
    assert cut["layers"][0]["method"].startswith(form)
    assert made.model.states == [3]
    model, calibration = restore_model(tmp_path / "run.safetensors")
    assert torch.equal(model(calibration[0]), made.model(calibration[0]))
    control = TrainingRun(METHODS["small_projected"], made_task, tmp_path / "control.safetensors", ())
    layer = control.model.blocks[0].layer
    assert (layer.head_k_dim, layer.d_state, layer.head_v_dim) == (8, 3, 4)
    control.train_step()


@pytest.mark.parametrize("options", [{"decay": "scalar"}, {"decay": "channel", "conv": 0}, {"decay": "none"}])
def test_linear_attention_shrinks_and_is_restored(options, tmp_path):
    tiny = {key: value for key, value in TINY.items() if key != "headdim"}
    made_task = make_task(resolve("recall", {**tiny, "model": "linear_attention", **options}), None, CPU)
    made = finished(TrainingRun(METHODS["compressed"], made_task, tmp_path / "run.safetensors", ()))
    assert made.model.states == [3]
    assert made.model.blocks[0].layer.q_proj.weight.shape[0] == 6
    model, calibration = restore_model(tmp_path / "run.safetensors")
    assert torch.equal(model(calibration[0]), made.model(calibration[0]))
    assert made_task.model.kernel_plan(9, CPU).op == "linear_attention"


def test_linear_attention_settings_are_checked():
    for options, words in (
        ({"decay": "slow"}, "decay: got 'slow'"),
        ({"heads": 3}, r"heads = 3 must divide expand"),
        ({"runs": ["random_subset"]}, "the model 'linear_attention' has none"),
    ):
        with pytest.raises(ConfigError, match=words):
            resolve("recall", {"model": "linear_attention", **options})


def test_tuning_sees_other_sequences():
    data = task(pairs=12, keys=31, values=32, length=40).data
    (tokens, _), (others, _) = data.draw(16, 3), data.held_out().draw(16, 3)
    assert not (tokens[:, None] == others).all(-1).any()
    assert torch.equal(tokens, data.draw(16, 3)[0])
