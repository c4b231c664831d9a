"""Checks of what happens where processes under DistributedDataParallel differ; ``ddp_checks.py`` runs them too."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import compressm
from compressm.errors import DataError, DistributedError
from distributed import cases

CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


@check
def a_parameter_that_differs_raises_everywhere(folder):
    model = DDP(cases.make("lru"))
    optimizer = cases.adam(model)
    for tokens in cases.batches(3, 4, seed=1):
        cases.step(model, optimizer, tokens)
    compressor = compressm.Compressor(model, optimizer, **cases.arguments(schedule=compressm.At([1])))
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.module.layers[1].nu_log[0] += 1e-9
    before = cases.fingerprint(model.module, optimizer)
    parameters = list(model.parameters())
    with pytest.raises(DistributedError, match=r"layers\.1.*before the reduction: rank\(s\) 1 differ"):
        compressor.step()
    assert cases.fingerprint(model.module, optimizer) == before
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    cases.step(compressor.rewrap(), optimizer, tokens)


@check
def shapes_that_differ_after_surgery_raise_everywhere_and_are_undone(folder):
    model = DDP(cases.make("mamba"))
    optimizer = cases.adam(model)
    for tokens in cases.batches(2, 4, seed=1):
        cases.step(model, optimizer, tokens)
    if dist.get_rank() == 1:  # a state that only one process has
        del optimizer.state[model.module.layers[0].A_log]["exp_avg"]
        optimizer.state[model.module.layers[0].A_log]["foreign"] = 1.0
    before, parameters = [p.detach().clone() for p in model.parameters()], list(model.parameters())
    compressor = compressm.Compressor(model, optimizer, **cases.arguments(schedule=compressm.At([1])))
    with pytest.raises(DistributedError, match="shapes of the new parameters"):
        compressor.step()
    assert [layer.d_state for layer in model.module.layers] == [7, 6]
    assert model.module.layers[0].x_proj.out_features == model.module.layers[0].x_proj.weight.shape[0]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p in optimizer.state for p in model.parameters())
    model(tokens)


@check
def a_failure_on_one_rank_raises_on_all(folder):
    model = DDP(cases.make("lru"))
    optimizer = cases.adam(model)

    def forward(inner, tokens):
        return inner(tokens) * (float("nan") if dist.get_rank() == 1 else 1.0)

    broken = [True]

    def fails(inner, tokens):
        if dist.get_rank() == 1 and broken:
            raise ZeroDivisionError("at home")
        return inner(tokens)

    calibration = cases.own(cases.batches(2, 2, seed=3))
    options = cases.arguments(schedule=compressm.At([1]), calibration=calibration)
    there = (DistributedError, "rank 1.*ZeroDivisionError")
    expected = (DataError, r"on a batch failed \(ZeroDivisionError: at home") if dist.get_rank() == 1 else there
    with pytest.raises(expected[0], match=expected[1]):
        compressm.Compressor(model, optimizer, forward=fails, **options)
    broken.clear()
    compressor = compressm.Compressor(model, optimizer, forward=fails, **options)
    broken.append(True)
    expected = (ZeroDivisionError, "at home") if dist.get_rank() == 1 else there
    with pytest.raises(expected[0], match=expected[1]):
        compressor.step()
    with pytest.raises(compressm.CompressmError, match="not finite"):
        compressm.Compressor(model, optimizer, forward=forward, **options)
    assert compressor.rewrap() is model
    model(torch.zeros(1, 4, dtype=torch.long))


@check
def arguments_that_differ_raise_everywhere(folder):
    model = DDP(cases.make("lru"))
    policy = compressm.FixedRank(3 + dist.get_rank())
    with pytest.raises(DistributedError, match="arguments of the Compressor"):
        compressm.Compressor(model, cases.adam(model), **cases.arguments(policy=policy))


@check
def rank_0_decides(folder):
    class Odd(compressm.compression.LayerPolicy):
        """Machines that round differently: one state more on rank 1."""

        def rank(self, spectrum):
            return 3 + dist.get_rank()

    *_, model, optimizer, compressor = cases.train_together("lru", DDP, steps=4, policy=Odd())
    assert set(compressor.ranks.values()) == {3}
    cases.assert_identical_everywhere(cases.fingerprint(model.module, optimizer))


@check
def rounding_of_one_rank_is_overruled(folder):
    from compressm.adapters.lru import LRUAdapter

    class Rounds(LRUAdapter):
        def edit(self, module, reduction):
            edit = super().edit(module, reduction)
            if dist.get_rank() == 1:
                for value in edit.tensors.values():
                    value.mul_(1 + 1e-15)
            return edit

    class Layer(compressm.layers.LRU):
        pass

    compressm.register_adapter(Layer, Rounds())
    plain = cases.make("lru")
    torch.manual_seed(3)
    plain.layers[0] = Layer(6, 9).double()
    model = DDP(plain)
    optimizer = cases.adam(model)
    compressor = compressm.Compressor(model, optimizer, **cases.arguments(schedule=compressm.At([1])))
    cases.step(model, optimizer, cases.batches(1, 2, seed=1)[0])
    assert compressor.step().changed
    cases.assert_identical_everywhere(cases.fingerprint(plain, optimizer))
