"""The language model, and its runs: stopped, resumed, cut."""

from __future__ import annotations

import math
import shutil
from functools import partial

import pytest
import torch
from experiments.silent import Silent
from torch import nn

from compressm.errors import CheckpointError, ConfigError
from compressm.experiments.methods import METHODS
from compressm.experiments.settings import read_settings, resolve
from compressm.experiments.tasks.models.language_model import LanguageModel, parameter_groups
from compressm.experiments.tasks.objectives.next_byte import evaluate_windows, predict
from compressm.experiments.tasks.task import make_task
from compressm.experiments.training import TrainingRun
from compressm.layers import Mamba

TINY = {
    "steps": 20, "blocks": 1, "d_model": 8, "d_state": 8, "rank": 3, "length": 16, "batch_size": 4, "eval_bytes": 128,
    "eval_every": 8, "log_every": 4, "calibration_sequences": 8, "reduce_until": 0.5,
}  # fmt: skip


@pytest.fixture
def make(source_folder, tmp_path):
    def build(name="compressed", file="run", **overrides):
        settings = resolve("stdlib-lm", {**TINY, **overrides})
        task = make_task(settings, source_folder, torch.device("cpu"))
        return TrainingRun(METHODS[name], task, tmp_path / f"{file}.safetensors")

    return build


def mamba_model(d_model, states):
    return LanguageModel(d_model, states, "mamba", partial(Mamba, d_model))


def timeless(record):
    drop = {"seconds", "seconds_per_step"}
    lists = [[{k: v for k, v in d.items() if k not in drop} for d in part] for part in (record.curve, record.reductions)]
    return record.step, lists, record.evaluations, record.test


def test_shapes_tying_and_order():
    model = mamba_model(8, [4, 5])
    tokens = torch.randint(0, 256, (3, 11), dtype=torch.uint8)
    scores = model(tokens)
    assert scores.shape == (3, 11, 256)
    assert model.states == [4, 5]
    changed = tokens.clone()
    changed[:, 7] += 1  # modulo 256
    assert torch.equal(model(changed)[:, :7], scores[:, :7])
    assert not torch.equal(model(changed)[:, 7], scores[:, 7])
    names = dict(model.named_parameters())
    assert [name for name, p in names.items() if 256 in p.shape] == ["embedding.weight"]
    with torch.no_grad():
        for block in model.blocks:
            block.mamba.out_proj.weight.zero_()
    x = model.embedding.weight[tokens.long()]
    expected = x / x.square().mean(-1, keepdim=True).add(1e-5).sqrt() @ model.embedding.weight.T
    torch.testing.assert_close(model(tokens), expected)


def test_a_head_of_its_own_leaves_the_rest_as_it_is():
    models = []
    for tied in (True, False):
        torch.manual_seed(0)
        models.append(LanguageModel(8, [4], "mamba", partial(Mamba, 8), vocabulary=7, tied=tied))
    tied, free = models
    assert {name for name, _ in free.named_parameters()} - {name for name, _ in tied.named_parameters()} == {"head.weight"}
    assert all(torch.equal(free.get_parameter(name), p) for name, p in tied.named_parameters() if "embed" not in name)
    tokens = torch.randint(0, 7, (2, 5))
    with torch.no_grad():
        free.embedding.weight.copy_(tied.embedding.weight)
        free.head.weight.copy_(tied.embedding.weight)
    assert torch.equal(free(tokens), tied(tokens))


@torch.no_grad()
def test_initialisation():
    model = mamba_model(64, [8] * 4)
    assert float(model.embedding.weight.std()) == pytest.approx(0.02, rel=0.05)
    bound = 1 / math.sqrt(128) / math.sqrt(4)  # uniform: kaiming with a = sqrt(5), over the root of four residual layers
    for block in model.blocks:
        assert float(block.mamba.out_proj.weight.abs().max()) == pytest.approx(bound, rel=0.02)
        assert torch.equal(block.mamba.D, torch.ones(128))


def test_matrices_decay_and_nothing_else():
    model = mamba_model(8, [4])
    decayed, kept = parameter_groups(model, 0.01, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], kept["weight_decay"], kept["lr"]) == (0.1, 0.0, 0.01)
    assert {names[id(p)].removeprefix("blocks.0.mamba.") for p in decayed["params"]} == {
        "in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"
    }  # fmt: skip
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


@torch.no_grad()
def test_loss_counts_every_byte_but_the_first():
    class Shift(nn.Module):
        def forward(self, tokens):
            return 100.0 * nn.functional.one_hot((tokens.long() + 1) % 256, 256)

    windows = torch.arange(12, dtype=torch.uint8).view(2, 6)
    assert float(predict(Shift(), windows)[1]) == 0.0
    windows[0, 3] = 77  # neither this byte nor the one behind it is guessed
    assert float(predict(Shift(), windows)[1]) == pytest.approx(20.0)
    assert evaluate_windows(Shift(), windows, batch_size=1).tolist() == pytest.approx([40.0, 0.0])


def test_evaluation_is_in_bits_nats_and_perplexity(make):
    run = make("full")
    found = run.task.objective.evaluate(run.model, "test")
    assert found["bits_per_byte"] == pytest.approx(8.0, abs=0.3)
    assert found["loss"] == pytest.approx(found["bits_per_byte"] * math.log(2))
    assert found["perplexity"] == pytest.approx(2 ** found["bits_per_byte"])
    assert found != run.task.objective.evaluate(run.model, "validation")
    assert run.model.training
    assert run.task.describe()["test_measured"] == 128


@pytest.mark.parametrize("name", ["compressed", "full", "small"])
def test_a_run_stopped_anywhere_resumes_to_the_same_result(make, name):
    whole = make(name, "whole")
    assert whole.train(Silent(), lambda: False)
    assert whole.model.states == [8 if name == "full" else 3]
    assert [cut["step"] for cut in whole.record.reductions] == [10] * (name == "compressed")
    for stop in (1, 9, 10, 11, 19):
        part = make(name, "part")
        assert not part.train(Silent(), lambda part=part, stop=stop: part.record.step >= stop)
        rest = make(name, "part")
        rest.restore()
        assert rest.record.step == stop
        assert rest.train(Silent(), lambda: False)
        assert timeless(rest.record) == timeless(whole.record)
        for (key, a), b in zip(whole.model.named_parameters(), rest.model.parameters(), strict=True):
            assert torch.equal(a, b), (stop, key)


def test_the_result_is_of_the_test_part_and_the_curve_of_the_validation_part(make):
    run = make("full")
    run.train(Silent(), lambda: False)
    final, last = run.summary()["final"], run.record.evaluations[-1]
    assert final["states"] == {"blocks.0.mamba": 8}
    assert {k: final[k] for k in ("bits_per_byte", "loss", "perplexity")} == run.task.objective.evaluate(run.model, "test")
    assert len(final["window_bits"]) == 8
    assert sum(final["window_bits"]) / 8 == pytest.approx(final["bits_per_byte"], abs=1e-5)
    assert last["bits_per_byte"] == run.task.objective.evaluate(run.model, "validation")["bits_per_byte"]
    assert run.record.curve[-1]["bits_per_byte"] == pytest.approx(run.record.curve[-1]["loss"] / math.log(2))


def test_resuming_on_other_text_is_refused(make, source_folder, tmp_path):
    run = make("full", steps=2)
    run.train(Silent(), lambda: False)
    other = tmp_path / "other"
    shutil.copytree(source_folder, other)
    moved = TrainingRun(METHODS["full"], make_task(run.settings, other, torch.device("cpu")), run.path)
    moved.restore()
    assert moved.record.step == 2
    (other / "package1" / "module1.py").write_text("changed = 1\n")
    changed = TrainingRun(METHODS["full"], make_task(run.settings, other, torch.device("cpu")), run.path)
    with pytest.raises(CheckpointError, match=r"the data have changed \(.*sha256 .*, now .*start anew"):
        changed.restore()


def test_gradients_are_clipped(make):
    clipped = make("full", max_grad_norm=1e-3)
    clipped.optimizer.zero_grad = lambda: None
    clipped.train_step()
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in clipped.model.parameters()]))
    assert float(norm) == pytest.approx(1e-3, rel=1e-2)


def test_autocast(make):
    losses, gradients = {}, {}
    for autocast in (None, "bfloat16"):
        run = make("full", autocast=autocast)
        run.optimizer.zero_grad = lambda: None
        run.train_step()
        losses[autocast] = run._recent.take()[0][0]
        gradients[autocast] = torch.cat([p.grad.flatten() for p in run.model.parameters()])
    assert losses[None] != losses["bfloat16"] == pytest.approx(losses[None], rel=1e-2)
    difference = gradients["bfloat16"] - gradients[None]
    assert 0 < float(difference.norm() / gradients[None].norm()) < 0.03


def test_keys_of_the_other_task_are_refused():
    for key, value in {"max_phase": 1.0, "tau": 0.1, "dropout": 0.1, "recipe": "paper", "attempts": 2}.items():
        with pytest.raises(ConfigError, match=rf"^{key} has no meaning for the dataset 'stdlib', expected one of .*rank"):
            resolve("stdlib-lm", {key: value})
    for key in ("length", "expand", "eval_bytes"):
        with pytest.raises(ConfigError, match=rf"{key} has no meaning for the dataset 'digits', expected one of .*tau"):
            resolve("digits", {key: 7})
    with pytest.raises(ConfigError, match=r"unknown key 'lenght' \(did you mean 'length'\?\)") as caught:
        resolve("stdlib-lm", {"lenght": 3})
    assert "max_phase" not in str(caught.value)
    with pytest.raises(ConfigError, match="rank = 128 must be below d_state = 128"):
        resolve("stdlib-lm", {"rank": 128})
    with pytest.raises(ConfigError, match="small_narrow"):
        resolve("stdlib-lm", {"runs": ["compressed", "small_narrow"]})


def test_saved_settings_hold_the_keys_of_their_task_and_are_read_back():
    for preset, foreign in (("stdlib-lm", "tau"), ("digits", "length")):
        settings = resolve(preset, {})
        assert foreign not in settings.to_dict()
        assert read_settings(settings.to_dict()) == settings
