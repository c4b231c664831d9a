"""Whatever holds a parameter when it is replaced follows, or is named in a warning."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from compression.guard_cases import Script
from mixed_runs import Mixed, compressor_of, layer_parameters, train
from torch import nn

import compressm
from compressm.compression import StaleCopyWarning


def cut(model, optimizer=None, rank=5, **options):
    return compressm.compress(model, compressm.FixedRank(rank), optimizer=optimizer, **options)


# Optimizers that are not passed along.


def test_an_optimizer_that_is_not_passed_is_named(snapshot):
    model = Mixed()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, [optimizer], 2)
    before = snapshot(model, optimizer)
    with pytest.raises(StaleCopyWarning, match=r"AdamW holds layers\.0\.B_im, .* was not passed along.*Pass it as optimizer="):
        cut(model)
    before.check()
    with pytest.warns(StaleCopyWarning, match="AdamW holds") as told:
        cut(model)
    assert len(told) == 1


def test_an_optimizer_from_an_earlier_phase_is_named():
    model = Mixed()
    first, second = torch.optim.Adam(model.parameters()), torch.optim.SGD(model.layers[1].parameters(), lr=0.1)
    with pytest.warns(StaleCopyWarning, match=r"^SGD holds layers\.1\.A_log, layers\.1\.x_proj\.weight and was not"):
        cut(model, first)
    assert model.layers[1].A_log is not second.param_groups[0]["params"][0]
    with pytest.warns(StaleCopyWarning, match="^Adam holds"):
        compressor_of(model, None, rank=3, at=1).step()


def test_an_optimizer_is_named_when_a_checkpoint_has_other_ranks(tmp_path):
    small, model = Mixed(), Mixed()
    cut(small)
    path = compressm.save(tmp_path / "small", small)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.warns(StaleCopyWarning, match=r"AdamW holds layers\.0\.B_im"):
        compressm.load(path, model)
    same = copy.deepcopy(small)
    other = torch.optim.AdamW(same.parameters())
    compressm.load(path, same)  # nothing is replaced
    assert {p.shape for p in other.param_groups[0]["params"]} != {p.shape for p in optimizer.param_groups[0]["params"]}


def test_an_optimizer_of_the_reduced_model_is_named_at_a_rollback(whole):
    one = whole()
    compressor = one.guarded(compressm.Rollback(Script(1.0, 1.0, 2.0), recovery=1, failures=1))
    one.steps(compressor, 3)
    extra = torch.optim.SGD(one.model.lrus[1].parameters(), lr=0.1)
    with pytest.warns(StaleCopyWarning, match=r"^SGD holds lrus\.1\.B_im"):
        one.steps(compressor, 1)
    assert extra.param_groups[0]["params"][0].shape == (3,)


def test_optimizers_that_nobody_can_reach_any_more_are_not_named():
    """Whatever holds itself lives until the garbage collector comes round."""
    model = Mixed()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.trainer = {"optimizer": optimizer}
    dead = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert dead() is not None
        cut(model)
    finally:
        gc.enable()
    assert dead() is None


class Wrapped(torch.optim.Optimizer):
    """An optimizer around another, as accelerate's, without a __init__ of its base."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @property
    def state(self):
        return self.optimizer.state


@pytest.mark.parametrize("passed", ["wrapper", "inner"])
def test_a_wrapper_and_its_optimizer_are_one(passed):
    model = Mixed()
    inner = torch.optim.AdamW(model.parameters())
    train(model, [inner], 1)
    wrapper = Wrapped(inner)
    cut(model, wrapper if passed == "wrapper" else inner)
    assert {id(p) for p in wrapper.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


def test_optimizers_of_other_parameters_are_not_named():
    model = Mixed()
    others = [torch.optim.SGD(model.head.parameters(), lr=0.1), torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)]
    unborn = torch.optim.Adam.__new__(torch.optim.Adam)
    cut(model)
    assert len(others) == 2
    assert not vars(unborn)


# The memory of a parameter.


class SharedAdam(torch.optim.Adam):
    """State from the beginning and in shared memory, as asynchronous training has it."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        for group in self.param_groups:
            for p in group["params"]:
                step, shape = torch.zeros(()), torch.zeros_like
                self.state[p] = {"step": step, "exp_avg": shape(p), "exp_avg_sq": shape(p)}
                for value in self.state[p].values():
                    value.share_memory_()


def test_shared_memory_stays_shared_and_other_processes_are_thought_of():
    model = Mixed().share_memory()
    optimizer = SharedAdam(model.parameters())
    train(model, [optimizer], 2)
    average = {name: p.detach().clone().share_memory_() for name, p in model.named_parameters()}
    with pytest.warns(StaleCopyWarning, match=r"layers\.0\.B_im, .* lie in memory shared between processes") as told:
        cut(model, optimizer, ema=average)
    assert len(told) == 1
    assert all(p.is_shared() for p in model.parameters())
    assert all(value.is_shared() for state in optimizer.state.values() for value in state.values())
    assert all(value.is_shared() for value in average.values())
    assert len(optimizer.state) == len(list(model.parameters()))


def test_private_memory_stays_private():
    model = Mixed()
    cut(model)
    assert not any(p.is_shared() for p in model.parameters())


def transposed(model):
    """The same model with every matrix stored column by column; returns it."""
    for name, p in layer_parameters(model).items():
        if p.dim() == 2:
            layer, _, key = name.rpartition(".")
            setattr(model.get_submodule(layer), key, nn.Parameter(p.detach().t().contiguous().t()))
    return model


def columns(model):
    return [p.t().is_contiguous() for p in layer_parameters(model).values() if p.dim() == 2]


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
def test_the_order_of_dimensions_in_memory_stays(cls, tmp_path):
    """Fused steps run through parameters and state as through flat arrays: both must lie alike, after a reduction, a load and
    a rollback from disk."""
    torch.manual_seed(0)
    plain = Mixed()
    odd = transposed(copy.deepcopy(plain))
    options = {"fused": True, "lr": 1e-2} | ({"momentum": 0.9} if cls is torch.optim.SGD else {})
    runs = [(model, cls(model.parameters(), **options)) for model in (plain, odd)]

    def same():
        for left, right in zip(*(model.parameters() for model, _ in runs), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)

    compressors = []
    for model, optimizer in runs:
        model.norms = nn.ModuleList([nn.BatchNorm1d(2)])  # what the scripted metric touches
        guard = compressm.Rollback(Script(1.0, 2.0), recovery=3, jump=None, failures=1, disk_bytes=0, folder=tmp_path)
        compressors.append(compressor_of(model, optimizer, rank=5, at=3, guard=guard))
        train(model, [optimizer], 5, compressors[-1])
    assert compressors[1].ranks == {"layers.0": 5, "layers.1": 5}
    assert all(columns(odd))
    same()
    for number, (model, optimizer) in enumerate(runs):
        train(model, [optimizer], 1, compressors[number])
    assert [c.history[-1].outcome for c in compressors] == ["rolled back"] * 2
    assert compressors[1].ranks == {"layers.0": 16, "layers.1": 16}
    assert all(columns(odd))
    for number, (model, optimizer) in enumerate(runs):
        train(model, [optimizer], 3)
        compressm.save(tmp_path / str(number), model, optimizer=optimizer)
    same()
    for number, (model, optimizer) in enumerate(runs):
        compressm.load(tmp_path / str(number), model, optimizer=optimizer)
        train(model, [optimizer], 3)
    same()
