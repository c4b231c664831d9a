"""Presets, models, and runs that are stopped and resumed."""

from __future__ import annotations

import math

import pytest
import torch

import compressm
from compressm.errors import ConfigError, NumericalError
from compressm.experiments import training
from compressm.experiments.declared import parse_assignments
from compressm.experiments.methods import METHODS
from compressm.experiments.methods.compressed import Compressed
from compressm.experiments.settings import resolve
from compressm.experiments.tasks.batches import SEEDS_PER_BLOCK, Batches, step_seed
from compressm.experiments.tasks.models.lru import Classifier, parameter_groups
from compressm.experiments.tasks.objectives.classification import evaluate
from compressm.experiments.tasks.presets import PRESETS
from compressm.experiments.tasks.rates import learning_rate
from compressm.experiments.tasks.task import make_task
from compressm.experiments.training import TrainingRun, pick_device

TINY = {"steps": 24, "d_state": 12, "d_model": 4, "batch_size": 16, "eval_every": 10, "log_every": 4, "reduce_until": 0.5}


class Listener:
    """Remembers what it is told."""

    def __init__(self):
        self.points, self.evaluations, self.reductions = [], [], []

    def point(self, run, point):
        self.points.append(point)

    def evaluation(self, run, evaluation):
        self.evaluations.append(evaluation)

    def reduction(self, run, reduction):
        self.reductions.append(reduction)


def make(path, name="compressed", **overrides):
    settings = resolve("digits", {**TINY, **overrides})
    return TrainingRun(METHODS[name], make_task(settings, None, torch.device("cpu")), path)


def never():
    return False


def timeless(record):
    """A record's tree without its times."""
    drop = {"seconds", "seconds_per_step"}
    lists = [[{k: v for k, v in d.items() if k not in drop} for d in part] for part in (record.curve, record.reductions)]
    return record.step, lists, record.evaluations


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_a_run_stopped_anywhere_resumes_to_the_same_result(tmp_path, recipe):
    overrides = {"recipe": recipe, "attempts": 3 if recipe == "paper" else 1, "tau": 0.3, "dropout": 0.2}
    whole = make(tmp_path / "whole.safetensors", **overrides)
    assert whole.train(Listener(), never)
    assert whole.record.reductions[-1]["ranks"] == {f"blocks.{i}.lru": n for i, n in enumerate(whole.model.states)}
    assert max(whole.model.states) < 12
    for cut in (1, 4, 11, 12, 13, 23):
        part = make(tmp_path / "part.safetensors", **overrides)
        assert not part.train(Listener(), lambda cut=cut, part=part: part.record.step >= cut)
        assert part.record.step == cut
        rest = make(tmp_path / "part.safetensors", **overrides)
        rest.restore()
        assert rest.train(Listener(), never)
        assert timeless(rest.record) == timeless(whole.record)
        for (name, a), b in zip(whole.model.named_parameters(), rest.model.parameters(), strict=True):
            assert torch.equal(a, b), (cut, name)
        assert rest.compressor.history[-1].ranks == whole.compressor.history[-1].ranks


class Guarded(Compressed):
    """With a guard that acts off schedule: it judges, undoes, and tries again at the next step."""

    def __init__(self, values):
        self.values = values

    def compressor(self, run):
        values = list(self.values)
        return compressm.Compressor(
            run.model, run.optimizer, policy=compressm.FixedRank(5), schedule=compressm.Once(24, at=0.5),
            guard=compressm.Rollback(lambda model: values.pop(0) if len(values) > 1 else values[0], jump=None, recovery=5),
        )  # fmt: skip


def guarded(path, values):
    settings = resolve("digits", {**TINY, "eval_every": 4, "log_every": 3})
    return TrainingRun(Guarded(values), make_task(settings, None, torch.device("cpu")), path)


def test_a_guard_that_acts_off_schedule(tmp_path):
    """Rolled back at step 17 to 12, reduced again at 13, accepted at 18: the record is that of the way that counts."""
    run, listener = guarded(tmp_path / "a", (1.0, 2.0, 1.0, 1.0)), Listener()
    assert run.train(listener, never)
    record = run.record
    assert [(verdict["outcome"], verdict["step"]) for verdict in record.verdicts] == [("rolled back", 17), ("accepted", 18)]
    assert all({"accuracy_before", "accuracy_after"} <= verdict.keys() for verdict in record.verdicts)
    assert [reduction["step"] for reduction in listener.reductions] == [12, 13]
    assert [reduction["step"] for reduction in record.reductions] == [13]
    assert record.step == run.compressor.step_count == run.scheduler.last_epoch == 24
    steps = [point["step"] for point in record.curve]
    assert steps == sorted(set(steps))
    assert steps[-1] == 24
    assert [evaluation["step"] for evaluation in record.evaluations] == [4, 8, 12, 16, 20, 24]
    assert record.test
    assert max(run.model.states) < 12
    assert [entry["outcome"] for entry in run.summary()["verdicts"]] == ["rolled back", "accepted"]


def test_a_run_whose_last_step_is_undone_goes_on(tmp_path):
    run = guarded(tmp_path / "a", (1.0, 2.0))
    run.compressor.guard.window = 12
    assert run.train(Listener(), never)
    assert [(verdict["outcome"], verdict["step"]) for verdict in run.record.verdicts] == [("rolled back", 24)]
    assert run.record.step == 24
    assert run.record.evaluations[-1]["step"] == 24
    assert [reduction["step"] for reduction in run.record.reductions] == [13]  # the gentler attempt
    assert run.model.states == [9] * run.settings.blocks


def test_a_guarded_run_stopped_anywhere_resumes_to_the_same_result(tmp_path):
    whole = guarded(tmp_path / "whole", (1.0, 2.0, 1.0, 1.0))
    assert whole.train(Listener(), never)
    for cut, left in ((11, (1.0, 2.0, 1.0, 1.0)), (14, (2.0, 1.0, 1.0))):
        part = guarded(tmp_path / "part", (1.0, 2.0, 1.0, 1.0))
        assert not part.train(Listener(), lambda cut=cut, part=part: part.record.step >= cut)
        rest = guarded(tmp_path / "part", left)
        rest.restore()
        assert rest.train(Listener(), never)
        assert timeless(rest.record) == timeless(whole.record)
        assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True))


def test_the_record_is_the_sum_of_the_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(training._Recent, "capacity", 3)
    run, losses = make(tmp_path / "a", "full", steps=8, log_every=8, eval_every=8), []
    append = run._recent.append
    monkeypatch.setattr(run._recent, "append", lambda loss, tally: (losses.append(float(loss)), append(loss, tally)))
    assert run.train(Listener(), never)
    assert [point["loss"] for point in run.record.curve] == [sum(losses) / 8]


def test_autocast_rounds_products_and_trains_to_the_same_loss(tmp_path):
    runs, losses = {}, {}
    for autocast in (None, "bfloat16"):
        runs[autocast] = make(tmp_path / f"{autocast}.safetensors", steps=60, lr=0.01, autocast=autocast)
        seen = Listener()
        assert runs[autocast].train(seen, never)
        losses[autocast] = torch.tensor([point["loss"] for point in seen.points])
    assert not torch.equal(losses[None], losses["bfloat16"])
    torch.testing.assert_close(losses["bfloat16"], losses[None], rtol=0.05, atol=0.05)
    assert {p.dtype for p in runs["bfloat16"].model.parameters()} == {torch.float32}
    with pytest.raises(ConfigError, match="autocast"):
        make(tmp_path / "x.safetensors", autocast="float16")


def test_runs_of_one_seed_agree_until_the_cut(tmp_path):
    big, cut = make(tmp_path / "a.safetensors", "full"), make(tmp_path / "b.safetensors", "compressed")
    seen = {run.name: Listener() for run in (big, cut)}
    for run in (big, cut):
        run.train(seen[run.name], never)
    losses = {name: [point["loss"] for point in listener.points] for name, listener in seen.items()}
    assert losses["full"][:3] == losses["compressed"][:3]
    assert losses["full"][3:] != losses["compressed"][3:]
    assert [r["step"] for r in seen["compressed"].reductions] == [12]
    assert seen["full"].reductions == []
    assert [e["step"] for e in seen["full"].evaluations] == [10, 20, 24]


def test_the_reduction_keeps_accuracy_and_names_kernels(tmp_path):
    run = make(tmp_path / "run.safetensors", steps=300, tau=0.02, d_state=16, d_model=8, lr=0.01)
    listener = Listener()
    run.train(listener, never)
    (reduction,) = listener.reductions
    assert abs(reduction["accuracy_after"] - reduction["accuracy_before"]) < 0.05
    for layer in reduction["layers"]:
        assert layer["gramians"] == "data"
        assert "lti_scan" in layer["kernel_plan_before"] and "lti_scan" in layer["kernel_plan_after"]  # noqa: PT018
    summary = run.summary()
    assert summary["final"]["accuracy"] > 0.3
    assert summary["final"]["states"] == reduction["ranks"]
    assert summary["parameters"] == sum(p.numel() for p in run.model.parameters())
    model = make(tmp_path / "other.safetensors", "full", d_state=16, d_model=8).model
    compressm.load(run.path, model)
    data = run.task.data
    assert evaluate(model, data.test_x, data.test_y, 100)[0] == summary["final"]["accuracy"]


def test_divergence_is_an_error(tmp_path):
    run = make(tmp_path / "run.safetensors", "full", log_every=2)
    with torch.no_grad():
        run.model.decoder.weight.fill_(torch.nan)
    with pytest.raises(NumericalError, match=r"run 'full': the loss is nan at step 2.*--set lr=0\.001"):
        run.train(Listener(), never)


def test_learning_rate_warms_up_and_falls():
    factor = learning_rate(resolve("digits", {"steps": 100, "warmup": 0.1, "cosine": True}))
    values = [factor(step) for step in range(101)]
    assert values[:10] == sorted(values[:10])
    assert math.isclose(values[10], 1.0)
    assert math.isclose(values[55], 0.5)
    assert values[100] < 1e-12
    least = learning_rate(resolve("digits", {"steps": 100, "warmup": 0.1, "cosine": True, "min_lr_ratio": 0.2}))
    assert [least(step) for step in range(11)] == values[:11]
    assert math.isclose(least(55), 0.6)
    assert math.isclose(least(100), 0.2)
    assert learning_rate(resolve("smnist-baseline", {}))(123_456) == 1.0


def test_every_step_has_a_seed_of_its_own():
    steps = [*range(SEEDS_PER_BLOCK + 3), 5 * SEEDS_PER_BLOCK]
    seeds = {seed: [step_seed(seed, step) for step in steps] for seed in (0, 1)}
    assert len({value for values in seeds.values() for value in values}) == 2 * len(steps)
    assert [step_seed(0, step) for step in reversed(steps)] == seeds[0][::-1]


def test_batches_are_the_examples_in_a_shuffled_order():
    x, y = torch.randn(7, 3, 1), torch.arange(7)
    first, again = (Batches(x, y, 2, seed=1) for _ in range(2))
    for step in (5, 0, 1, 2, 3):
        inputs, labels = first[step]
        assert torch.equal(inputs, x[labels])
        assert torch.equal(labels, again[step][1])
    epoch = torch.cat([first[step][1] for step in range(3)])
    assert len(epoch.unique()) == 6


def test_paper_presets():
    baseline, cut = resolve("smnist-baseline", {}), resolve("smnist-tau0.02", {})
    for s in (baseline, cut):
        assert (s.blocks, s.d_state, s.d_model, s.batch_size, s.lr, s.dropout, s.steps) == (1, 256, 8, 50, 4e-4, 0.1, 200_000)
    assert (baseline.runs, cut.runs) == (("full",), ("compressed",))
    assert (cut.recipe, cut.attempts, cut.reduce_until, cut.tau) == ("paper", 4, 0.1, 0.02)
    s = resolve("scifar-tau0.10", {})
    assert (s.blocks, s.d_state, s.d_model, s.batch_size, s.steps) == (6, 384, 512, 50, 180_000)
    assert (s.weight_decay, s.ssm_lr_factor, s.cosine, s.warmup > 0, s.tau) == (0.05, 0.25, True, True, 0.1)
    for name in PRESETS:
        assert resolve(name, {}).title


def test_wrong_settings_name_the_allowed_ones():
    with pytest.raises(ConfigError, match=r"preset: got 'smist' \(did you mean 'smnist'\?\), expected one of digits, smnist"):
        resolve("smist", {})
    with pytest.raises(ConfigError, match=r"unknown key 'd_sate' \(did you mean 'd_state'\?\).*expected one of .*d_model"):
        resolve("digits", {"d_sate": 3})
    with pytest.raises(ConfigError, match=r"tau: got 1.5"):
        resolve("digits", {"tau": 1.5})
    with pytest.raises(ConfigError, match="steps: got 'many'"):
        resolve("digits", {"steps": "many"})
    with pytest.raises(ConfigError, match="train longer or reduce later"):
        resolve("digits", {"steps": 2})
    with pytest.raises(ConfigError, match="'small' takes over from 'compressed', which must come before it"):
        resolve("digits", {"runs": ["small"]})
    with pytest.raises(ConfigError, match="expected key=value"):
        parse_assignments(["tau"])
    assert parse_assignments(["tau=0.5", 'runs=["full"]', "device=cpu", "cosine=false"]) == {
        "tau": 0.5, "runs": ["full"], "device": "cpu", "cosine": False
    }  # fmt: skip
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(ConfigError, match=f"device: got '{name}'"):
            pick_device(name)


def test_classifier_normalises_pixels_and_groups_parameters():
    pixels = torch.randint(0, 256, (3, 11, 2), dtype=torch.uint8)
    mean, std = torch.tensor([100.0, 20.0]), torch.tensor([50.0, 10.0])
    model = Classifier(2, 10, 4, [3, 5], mean=mean, std=std).eval()
    same = Classifier(2, 10, 4, [3, 5], mean=torch.zeros(2), std=torch.ones(2)).eval()
    same.load_state_dict({**model.state_dict(), "mean": torch.zeros(2), "std": torch.ones(2)})
    torch.testing.assert_close(model(pixels), same((pixels - mean) / std))
    assert model.states == [3, 5]
    rest, ssm = parameter_groups(model, 0.01, 0.25, 0.1)
    assert (rest["weight_decay"], ssm["weight_decay"], ssm["lr"]) == (0.1, 0.0, 0.0025)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in ssm["params"]} == {"nu_log", "theta_log", "gamma_log", "B_re", "B_im"}
    assert len(rest["params"]) + len(ssm["params"]) == len(names)
