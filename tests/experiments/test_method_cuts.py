"""Methods that cut as the compressed run does but choose in another way, in training and after it, on layers of both kinds."""

from __future__ import annotations

import math

import pytest
import torch
from experiments.silent import Silent

from compressm.errors import ConfigError
from compressm.experiments.methods import METHODS
from compressm.experiments.settings import resolve
from compressm.experiments.tasks.task import make_task
from compressm.experiments.training import TrainingRun

SIZES = {
    "sysid": {"d_state": 9, "rank": 4, "blocks": 2, "sequences": 48, "length": 20},
    "recall": {
        "blocks": 1, "d_model": 8, "d_state": 8, "rank": 3, "pairs": 2, "keys": 5, "values": 3, "length": 9,
        "test_sequences": 16,
    },
    "digits": {},
}  # fmt: skip
COMMON = {"steps": 20, "batch_size": 4, "log_every": 10, "eval_every": 20, "calibration_sequences": 4, "reduce_until": 0.2}
ROWS = {"drrqr": "DRRQR", "ghost": "GHOST", "output_energy": "OutputEnergy", "taylor": "Taylor"}


def trained(method, path, preset="sysid", **overrides):
    settings = resolve(preset, {**COMMON, **SIZES[preset], "runs": [method], **overrides})
    run = TrainingRun(METHODS[method], make_task(settings, None, torch.device("cpu")), path / method)
    assert run.train(Silent(), lambda: False)
    return run


def cut_of(run):
    """The step of its only reduction, and the record of its first layer."""
    (cut,) = run.record.reductions
    return cut["step"], cut["layers"][0]


@pytest.mark.parametrize(("method", "convention", "gramians"), [
    ("compressed", "real", "data"), ("compressed_paper", "complex", "data-free"), ("compressed_data_free", "real", "data-free"),
])  # fmt: skip
def test_recipes_of_an_lru(tmp_path, method, convention, gramians):
    run = trained(method, tmp_path)
    step, layer = cut_of(run)
    assert (step, layer["convention"], layer["gramians"]) == (4, convention, gramians)
    assert run.model.states == [4, 4]


def test_a_classifier_may_be_asked_for_a_rank(tmp_path):
    sizes = {"d_state": 9, "d_model": 4, "rank": 5, "steps": 6, "reduce_until": 0.5}
    assert resolve("digits", {**sizes, "runs": ["small"]}).runs == ("small",)  # needs no compressed run
    run = trained("compressed", tmp_path, "digits", **sizes)
    assert run.model.states == [5, 5]


def test_a_settled_spectrum_is_cut_when_it_says_so(tmp_path):
    run = trained("compressed_when_stable", tmp_path, steps=80)
    step, _ = cut_of(run)
    assert run.compressor.schedule.adaptive
    assert 4 < step <= 24
    assert run.model.states == [4, 4]
    with pytest.raises(ConfigError, match="checks between warmup and force"):
        resolve("sysid", {"runs": ["compressed_when_stable"], "steps": 6})


@pytest.mark.parametrize("model", ["mamba2", "gated_delta_net", "mamba"])
@pytest.mark.parametrize("method", ["random_subset", *ROWS])
def test_rows_are_cut_where_the_compressed_run_is(tmp_path, model, method):
    run = trained(method, tmp_path, "recall", model=model, **({"headdim": 4} if model == "mamba2" else {}))
    step, layer = cut_of(run)
    assert (step, layer["rank_after"], layer["convention"]) == (4, 3, "scores")
    assert layer["method"].removeprefix("strict, ") == ROWS.get(method, "RandomModes")
    assert layer["gramians"] == ("data-free" if method == "random_subset" else "data")


def test_a_second_cut_comes_late_and_ends_at_the_same_states(tmp_path):
    run = trained("compressed_twice", tmp_path, "recall", model="mamba", steps=10, reduce_until=0.4)
    assert [(cut["step"], cut["layers"][0]["rank_after"]) for cut in run.record.reductions] == [(4, 5), (6, 3)]
    with pytest.raises(ConfigError, match=r"reduce_until must be below 0\.6"):
        resolve("recall", {"runs": ["compressed_twice"], "reduce_until": 0.7})


def test_the_rate_doubles_at_the_cut(tmp_path):
    plain, faster = (trained(name, tmp_path, "recall", model="mamba") for name in ("compressed", "compressed_faster"))
    assert cut_of(plain)[0] == cut_of(faster)[0]
    rates = [run.optimizer.param_groups[0]["lr"] for run in (plain, faster)]
    assert rates[1] == pytest.approx(2 * rates[0])


def test_chance_follows_the_seed(tmp_path):
    kept = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        run = trained("random_subset", tmp_path / str(seed), "recall", model="mamba", seed=seed)
        kept.append(cut_of(run)[1]["spectrum"])
    assert kept[0] != kept[1]


@pytest.mark.parametrize(("preset", "method", "words"), [
    ("recall", "after_drrqr", "strict, DRRQR"), ("recall", "after_taylor", "strict, Taylor"),
    ("recall", "after_random", "strict, RandomModes"), ("recall", "after_ghost", "strict, GHOST"),
    ("recall", "after_output_energy", "strict, OutputEnergy"), ("sysid", "after_random", "RandomModes"),
    ("sysid", "after_last", "LAST"), ("sysid", "after_aire", "AIRE"), ("sysid", "modal_l1", "Modulus"),
])  # fmt: skip
def test_after_training(tmp_path, preset, method, words):
    run = trained(method, tmp_path, preset, **({"model": "gated_delta_net"} if preset == "recall" else {}))
    step, layer = cut_of(run)
    assert (step, layer["method"]) == (14, words)
    assert sum(run.model.states) == 3 if preset == "recall" else 8  # LAST and AIRE share these out by themselves


def test_strict_and_free_forms_of_the_compressed_run(tmp_path):
    methods = {
        name: trained(name, tmp_path, "recall", model="gated_delta_net")
        for name in ("compressed_strict", "compressed_data_free")
    }
    words = {name: cut_of(run)[1]["method"] for name, run in methods.items()}
    assert words["compressed_strict"] == "strict, backward subset"
    assert words["compressed_data_free"].startswith("projected")
    assert cut_of(methods["compressed_data_free"])[1]["gramians"] == "data-free"


def test_the_moduli_are_in_the_loss_until_the_cut(tmp_path):
    settings = resolve("sysid", {**COMMON, **SIZES["sysid"], "runs": ["modal_l1"], "modal_weight": 0.01})
    run = TrainingRun(METHODS["modal_l1"], make_task(settings, None, torch.device("cpu")), tmp_path / "a")
    outcome = run.task.objective.outcome(run.model, run.task.objective.batches[0])
    moduli = [block.lru.nu_log.exp().neg().exp().sum().item() for block in run.model.blocks]
    assert run.method.loss(run, outcome).item() == pytest.approx(0.01 * math.fsum(moduli), rel=1e-5)
    run.record.step = 14
    assert run.method.loss(run, outcome) is None


def test_what_does_not_fit_is_said():
    for preset, overrides, words in (
        (
            "sysid",
            {"runs": ["drrqr"]},
            "'drrqr' ranks rows of matrix-valued or selective states, the model 'lru_system'",
        ),
        ("recall", {"runs": ["after_last"]}, "'after_last' ranks modes of time-invariant layers, the model 'mamba2' has none"),
        ("recall", {"runs": ["compressed_paper"]}, "'compressed_paper' has no way to reduce matrix-valued states"),
        ("recall", {"runs": ["modal_l1"]}, "'modal_l1' has eigenvalues of LRUs in its loss"),
        (
            "sysid",
            {"runs": ["compressed_strict"]},
            "'compressed_strict' has a choice of forms",
        ),
        ("recall", {"runs": ["ghost"], "d_features": 80}, "with d_features = 80 layers have maps that mix states"),
    ):
        with pytest.raises(ConfigError, match=words):
            resolve(preset, overrides)
