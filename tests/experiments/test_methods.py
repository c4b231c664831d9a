"""The controls: what each of them starts from, adds to the loss, and cuts."""

from __future__ import annotations

import math

import pytest
import torch
from experiments.silent import Silent
from torch import nn

from compressm.control import DiagonalSystem
from compressm.errors import ConfigError
from compressm.experiments.methods import METHODS
from compressm.experiments.methods.small_spread import spread
from compressm.experiments.methods.spectra import hankel_norm
from compressm.experiments.settings import resolve
from compressm.experiments.tasks.task import make_task
from compressm.experiments.training import TrainingRun

SYSID = {
    "steps": 20, "batch_size": 4, "d_state": 9, "rank": 4, "sequences": 48, "length": 20, "log_every": 1, "eval_every": 20,
    "calibration_sequences": 4,
}  # fmt: skip
DIGITS = {
    "steps": 6, "batch_size": 8, "d_state": 6, "d_model": 4, "log_every": 1, "eval_every": 6, "tau": 0.3, "reduce_until": 0.5,
}  # fmt: skip


def make(method, path, finished=(), preset="sysid", **overrides):
    names = [*(run.name for run in finished), method]
    sizes = SYSID if preset == "sysid" else DIGITS
    task = make_task(resolve(preset, {**sizes, "runs": names, **overrides}), None, torch.device("cpu"))
    return TrainingRun(METHODS[method], task, path, finished)


def trained(*arguments, **overrides):
    run = make(*arguments, **overrides)
    assert run.train(Silent(), lambda: False)
    return run


def eigenvalues(layer):
    lam = torch.polar(layer.nu_log.exp().neg().exp(), layer.theta_log.exp()).detach()
    return lam


def test_a_random_subset_is_cut_where_the_compressed_run_is(tmp_path):
    compressed = trained("compressed", tmp_path / "a")
    chance = make("random_subset", tmp_path / "b", [compressed])
    assert not chance.train(Silent(), lambda: chance.record.step == 3)
    before = eigenvalues(chance.model.blocks[0].lru)
    while not chance.record.reductions:
        assert not chance.train(Silent(), lambda: True)
        after = eigenvalues(chance.model.blocks[0].lru)
        if not chance.record.reductions:
            before = after
    cuts = [run.record.reductions[0] for run in (compressed, chance)]
    assert [cut["step"] for cut in cuts] == [4, 4]
    assert [cut["ranks"] for cut in cuts] == [{"blocks.0.lru": 4}] * 2
    assert [cut["layers"][0]["method"] for cut in cuts] == ["balanced", "RandomModes"]
    assert all(float((before - lam).abs().min()) < 0.02 for lam in after)  # a step of the optimizer away
    losses = [[point["loss"] for point in run.record.curve[:4]] for run in (compressed, chance)]
    assert losses[0] == losses[1]


def test_states_follow_the_compressed_run_where_tau_decides(tmp_path):
    compressed = trained("compressed", tmp_path / "a", preset="digits")
    assert compressed.model.states != [6, 6]
    chance = trained("random_subset", tmp_path / "b", [compressed], preset="digits")
    later = trained("after_magnitude", tmp_path / "c", [compressed], preset="digits")
    assert chance.model.states == later.model.states == compressed.model.states
    with pytest.raises(ConfigError, match="'after_modal' takes over from 'compressed', which must come before it"):
        resolve("digits", {"runs": ["after_modal"]})
    assert resolve("sysid", {"runs": ["after_modal"]}).runs == ("after_modal",)


def test_spread_states_are_a_stratified_part_of_the_large_model(tmp_path):
    random = torch.Generator().manual_seed(0)
    phase = 2 * math.pi * torch.rand(60, generator=random)
    radius = torch.rand(60, generator=random)
    chosen = spread(radius, phase, 6, random)
    folded = torch.minimum(phase, 2 * math.pi - phase)
    ranks = folded.argsort().argsort()[chosen]
    assert (ranks // 10).sort().values.tolist() == [0, 1, 2, 3, 4, 5]
    heights = (radius.argsort().argsort()[chosen] // 10).unique()
    assert len(heights) >= 4  # of 6 parts; a random choice rarely meets so many
    small, full = make("small_spread", tmp_path / "a"), make("full", tmp_path / "b")
    ours, theirs = small.model.blocks[0].lru, full.model.blocks[0].lru
    index = [int((eigenvalues(theirs) - lam).abs().argmin()) for lam in eigenvalues(ours)]
    assert len(set(index)) == ours.d_state == 4
    assert torch.equal(ours.B_re, theirs.B_re[index])
    torch.testing.assert_close(ours.C_im, 1.5 * theirs.C_im[:, index])


def test_distillation_learns_from_classes_of_the_frozen_teacher(tmp_path):
    compressed = trained("compressed", tmp_path / "a", preset="digits")
    teacher = trained("full", tmp_path / "b", [compressed], preset="digits")
    student = make("distilled", tmp_path / "c", [compressed, teacher], preset="digits", distillation_alpha=0.3)
    assert student.model.states == compressed.model.states
    before = [p.detach().clone() for p in teacher.model.parameters()]
    x, y = batch = student.task.objective.batches[0]
    student.model.eval()
    outcome = student.task.objective.outcome(student.model, batch)
    total = outcome.loss + student.method.loss(student, outcome)
    teacher.model.eval()
    soft, own = (teacher.model(x) / 2).softmax(-1), student.model(x)
    expected = 0.7 * nn.functional.cross_entropy(own, y) + 0.3 * 4 * nn.functional.cross_entropy(own / 2, soft)
    torch.testing.assert_close(total, expected)
    student.train_step()
    assert not teacher.model.training
    assert all(torch.equal(p, old) and p.grad is None for p, old in zip(teacher.model.parameters(), before, strict=True))


def test_distillation_learns_from_signals(tmp_path):
    teacher = trained("full", tmp_path / "a", steps=2)
    student = make("distilled", tmp_path / "b", [teacher])
    x, y = batch = student.task.objective.batches[0]
    outcome = student.task.objective.outcome(student.model, batch)
    own, taught = student.model(x), teacher.model(x).detach()
    expected = (0.5 * (own - y).square() + 0.5 * (own - taught).square()).mean()
    torch.testing.assert_close(outcome.loss + student.method.loss(student, outcome), expected)
    with pytest.raises(ConfigError, match="'distilled' takes over from 'full', which must come before it"):
        resolve("sysid", {"runs": ["distilled"]})


def test_after_training_there_is_a_second_schedule(tmp_path):
    settings = resolve("sysid", {"steps": 100, "runs": ["after_modal"], "finetune": 0.4, "finetune_lr": 0.5})
    rate = METHODS["after_modal"].rate(settings)
    values = [rate(step) for step in range(101)]
    assert max(values[:60]) == values[3] == 1.0
    assert values[59] < 0.01
    assert max(values[60:]) == values[62] == 0.5
    assert values[100] < 1e-12
    for name, words in (("after_magnitude", "Magnitude"), ("after_modal", "PeakGain"), ("after_balanced", "balanced")):
        run = trained(name, tmp_path / name)
        (cut,) = run.record.reductions
        assert (cut["step"], cut["layers"][0]["method"]) == (14, words)
        assert run.model.states == [4]
    with pytest.raises(ConfigError, match="at least one step before the cut and one after"):
        resolve("sysid", {"runs": ["after_modal"], "steps": 1})


def test_the_hankel_norm_is_in_the_loss_until_the_cut(tmp_path):
    run = make("hankel_norm", tmp_path / "a", hankel_weight=0.01)
    layer = run.model.blocks[0].lru
    lam = eigenvalues(layer).to(torch.complex128)
    B = layer.gamma_log.double().exp()[:, None] * torch.complex(layer.B_re.double(), layer.B_im.double())
    C = torch.complex(layer.C_re.double(), layer.C_im.double())
    expected = DiagonalSystem.from_lam(lam, B, C).hankel_singular_values().sum()
    outcome = run.task.objective.outcome(run.model, run.task.objective.batches[0])
    torch.testing.assert_close(run.method.loss(run, outcome), (0.01 * expected).float(), rtol=1e-4, atol=0.0)
    run.record.step = 14
    assert run.method.loss(run, outcome) is None
    norms = []
    for weight in (0.0, 0.3):
        run = make("hankel_norm", tmp_path / "b", hankel_weight=weight)
        run.train(Silent(), lambda run=run: run.record.step == 13)
        norms.append(hankel_norm(run.model.blocks[0].lru).item())
    assert norms[1] < 0.95 * norms[0]
