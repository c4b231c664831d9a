"""What the Compressor refuses, and what it complains about; nothing has changed afterwards."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from torch import nn

import compressm
from compressm.compression import ScheduleWarning
from compressm.errors import ArgumentError, CompressmError, ModelError, NumericalError, OptimizerError


def compressor_of(run, policy=None, schedule=None, **kwargs):
    policy, schedule = policy or compressm.FixedRank(3), schedule or compressm.At([1])
    return compressm.Compressor(run.model, run.optimizer, policy=policy, schedule=schedule, **kwargs)


def test_paper_recipe_is_data_free(training):
    run = training()
    with pytest.raises(ArgumentError, match="calibration: recipe 'paper' is data-free"):
        compressor_of(run, recipe="paper", calibration=[run.batch()[0]])


def test_foreign_state_is_refused(training):
    run = training()
    compressor = compressor_of(run)
    state = compressor.state_dict()
    for change, match in (
        ({"format": 99}, "format: expected 1, got 99"),
        ({"recipe": "paper"}, "recipe: expected 'paper', as in the saved run, got default"),
        ({"ranks": {"lrus.0": 4, "lrus.1": 6}}, "ranks.*Load the model first"),
        ({"kept": {"lrus.0": 1.0}}, "layers"),
        ({"history": [{}]}, "history"),
    ):
        with pytest.raises(ArgumentError, match=match):
            compressor.load_state_dict({**state, **change})
    for bad in ({"step": 3}, None):
        with pytest.raises(ArgumentError, match=r"what Compressor\.state_dict\(\) returned"):
            compressor.load_state_dict(bad)
    assert compressor.state_dict() == state


def test_wrong_optimizers(training, make_net):
    run = training()
    other = torch.optim.Adam(make_net().parameters())
    with pytest.raises(OptimizerError, match=r"does not hold 14 trainable parameters.*lrus\.0\.nu_log"):
        compressm.Compressor(run.model, other, policy=compressm.FixedRank(3), schedule=compressm.At([1]))
    some = torch.optim.Adam([p for n, p in run.model.named_parameters() if n != "lrus.1.C_im"])
    with pytest.raises(OptimizerError, match=r"does not hold 1 trainable parameters.*\(lrus\.1\.C_im\)"):
        compressm.Compressor(run.model, some, policy=compressm.FixedRank(3), schedule=compressm.At([1]))
    run.model.lrus[1].C_im.requires_grad_(False)
    compressm.Compressor(run.model, some, policy=compressm.FixedRank(3), schedule=compressm.At([1]))
    with pytest.raises(OptimizerError, match="is in 2 parameter groups"):
        compressm.Compressor(run.model, [some, run.optimizer], policy=compressm.FixedRank(3), schedule=compressm.At([1]))
    with pytest.raises(ArgumentError, match=r"optimizer: expected a torch\.optim\.Optimizer.*got str"):
        compressm.Compressor(run.model, "adam", policy=compressm.FixedRank(3), schedule=compressm.At([1]))


def test_leftover_state_is_found(training):
    run = training()
    run.optimizer.state[torch.zeros(5)] = {"exp_avg": torch.zeros(5)}
    with pytest.raises(OptimizerError, match=r"holds state for a tensor of shape \(5,\)"):
        compressor_of(run)


def test_parallel_wrappers_are_refused(training, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        run = training()
        wrapped = nn.parallel.DistributedDataParallel(run.model)
        with pytest.raises(ModelError, match="wrapped in DistributedDataParallel, expected a plain one"):
            compressm.compress(wrapped, compressm.FixedRank(3))
        nested = nn.Sequential(wrapped)
        with pytest.raises(ModelError, match="DistributedDataParallel"):
            compressm.Compressor(nested, run.optimizer, policy=compressm.FixedRank(3), schedule=compressm.At([1]))
    finally:
        torch.distributed.destroy_process_group()


def test_models_that_cannot_be_compressed(training):
    run = training()
    with pytest.raises(ModelError, match=r"Linear has no state-space layer.*compressm\.layers\.lru\.LRU"):
        compressm.compress(nn.Linear(2, 2), compressm.FixedRank(3))
    with pytest.raises(ArgumentError, match=r"model: expected a torch\.nn\.Module, got dict"):
        compressm.compress({}, compressm.FixedRank(3))
    nn.utils.parametrizations.weight_norm(run.model.lrus[0], "B_re")
    for build in (lambda: compressor_of(run), lambda: compressm.compress(run.model, compressm.FixedRank(3))):
        with pytest.raises(ModelError, match=r"layer 'lrus\.0'.*B_re is not a plain parameter"):
            build()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"policy": 0.1}, "policy: expected an Energy, FixedRank, Shrink, Budget or ErrorBound instance, got 0.1"),
        ({"policy": compressm.Energy}, r"policy.*got Energy \(the class\)"),
        ({"policy": compressm.FixedRank({"lrus.7": 2})}, r"FixedRank: expected names.*got lrus\.7"),
        ({"schedule": 100}, "schedule: expected a Once, Warmup, Every, At or WhenStable instance, got 100"),
        ({"recipe": "papers"}, "recipe: expected one of default, paper, got 'papers'"),
        ({"moments": "keep"}, "moments: expected one of transport, reset, slice, got 'keep'"),
        ({"multiple_of": 0}, "multiple_of: expected a positive integer, got 0"),
        ({"ema": 5}, "ema: expected an nn.Module or a dict"),
    ],
)
def test_wrong_arguments(training, arguments, match):
    with pytest.raises(ArgumentError, match=match):
        compressor_of(training(), **arguments)


def test_a_policy_out_of_range_changes_nothing(training, snapshot):
    class Wild(compressm.compression.LayerPolicy):
        def __init__(self, answer):
            self.answer = answer

        def rank(self, spectrum):
            return self.answer

    run = training()
    before = snapshot(run.model, run.optimizer)
    for answer in (0, 7, 2.0, None):
        with pytest.raises(ArgumentError, match=r"policy: expected a rank between 1 and \d for layer 'lrus\.\d'"):
            compressor_of(run, Wild(answer)).step()
    before.check()


def test_diverged_model_changes_nothing(training, snapshot):
    run = training()
    compressor = compressor_of(run)
    with torch.no_grad():
        run.model.lrus[1].B_re[0, 0] = float("nan")
    del run.model.lrus[1].B_re.grad
    pointers = [(n, id(p)) for n, p in run.model.named_parameters()]
    with pytest.raises(NumericalError, match=r"layer 'lrus\.1' \(LRU\): parameter B_re holds 1 NaN"):
        compressor.step()
    assert [(n, id(p)) for n, p in run.model.named_parameters()] == pointers
    assert compressor.ranks == {"lrus.0": 8, "lrus.1": 6}
    assert compressor.history == []


def test_dead_layer_is_named(training):
    run = training()
    with torch.no_grad():
        run.model.lrus[1].B_re.zero_()
        run.model.lrus[1].B_im.zero_()
    with pytest.raises(NumericalError, match=r"layer 'lrus\.1': all 12 Hankel singular values are zero"):
        compressor_of(run, compressm.Energy(tau=0.1)).step()


def test_close_tells_about_missed_reductions(training):
    run = training()
    compressor = compressor_of(run, schedule=compressm.At([1, 5, 9]))
    compressor.step()
    with pytest.warns(ScheduleWarning, match=r"training ended at step 1, before the reductions scheduled at \[5, 9\]"):
        compressor.close()
    with pytest.raises(CompressmError, match=r"step\(\) was never called"), compressor_of(run):
        pass
    with pytest.raises(ZeroDivisionError), compressor_of(run):
        raise ZeroDivisionError


def test_forgotten_step_is_noticed_once(training):
    run = training()
    compressor = compressor_of(run, schedule=compressm.At([2, 3]))
    run.step(2)
    with pytest.warns(ScheduleWarning, match=r"has taken 3 steps but Compressor\.step\(\) was never called") as caught:
        run.step(3)
    assert len(caught) == 1
    del compressor
    gc.collect()
    run.step()


def test_no_complaint_where_step_is_called(training):
    run = training()
    compressor = compressor_of(run, schedule=compressm.At([2]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            run.step()
            compressor.step()
        compressor.close()
        run.step(3)
