"""Checks of DistributedDataParallel, run by every process of a launch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP

import compressm
from compressm.errors import DataError, ModelError, OptimizerError
from distributed import cases, ddp_agreement_checks, launch

CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def matches_one_process(kind):
    losses, model, optimizer, compressor = cases.train_together(kind, DDP)
    *alone, reference = cases.train_alone(kind)
    assert compressor.ranks == reference.ranks
    assert all(report.changed for report in reference.history)
    cases.assert_same_run(losses, model.module, optimizer, *alone)
    cases.assert_identical_everywhere(cases.fingerprint(model.module, optimizer))
    cases.assert_identical_everywhere(cases.progress(compressor))


@check
def lru_matches_one_process(folder):
    matches_one_process("lru")


@check
def mamba_matches_one_process(folder):
    matches_one_process("mamba")


@check
def mamba2_matches_one_process(folder):
    """Both layers get maps."""
    matches_one_process("mamba2")


@check
def mamba2_with_maps_matches_one_process(folder):
    matches_one_process("mamba2 with maps")


class Sent:
    """Bytes that Team hands to the collectives, by kind."""

    def __init__(self, monkeypatch):
        self.bytes = {"all_reduce": 0, "all_gather": 0, "broadcast": 0}
        for name in self.bytes:
            monkeypatch.setattr(dist, name, self._counting(name, getattr(dist, name)))

    def _counting(self, name, function):
        def counting(tensor, *args, **options):
            tensors = tensor if isinstance(tensor, list) else [tensor]
            self.bytes[name] += sum(item.numel() * item.element_size() for item in tensors)
            return function(tensor, *args, **options)

        return counting


@check
def bytes_are_those_of_the_formulas(folder):
    """docs/scaling.md, all parameters float64 here."""
    item, count, sequences, length, H, rank = 8, 8, 8, 12, 6, 3
    for kind, orders in (("lru", (9, 7)), ("mamba", (7, 6))):
        model = DDP(cases.make(kind))
        optimizer = cases.adam(model)
        cases.step(model, optimizer, cases.batches(1, 4, seed=1)[0])
        calibration = cases.own(cases.batches(2, sequences // 2, seed=5))
        options = cases.arguments(policy=compressm.FixedRank(rank), schedule=compressm.At([1]), calibration=calibration)
        compressor = compressm.Compressor(model, optimizer, **options)
        with pytest.MonkeyPatch.context() as patch:
            sent = Sent(patch)
            compressor.step()
        samples, D, R = sequences * length, H, 1
        if kind == "lru":
            reduced = sum(64 * N**2 + 2 * count for N in orders)
            gathered = 0
            broadcast = 2 * 3 * item * (3 * rank + 4 * rank * H)
        else:
            reduced = sum(16 * D * N + 8 * N**2 for N in orders)
            gathered = sum(4 * samples * (N**2 + N) for N in orders)
            broadcast = 2 * 3 * item * (D * rank + (R + 2 * rank) * D)
        gradients = 2 * count * len(orders)  # that every layer wanted and got
        assert sent.bytes["all_reduce"] == reduced + gradients + count  # and the number of sequences
        assert sent.bytes["all_gather"] == gathered
        assert sent.bytes["broadcast"] == broadcast


@check
def a_rank_without_calibration_batches(folder):
    mine = cases.batches(4, 4, seed=5) if dist.get_rank() == 0 else []
    for kind in ("lru", "mamba"):
        *_, model, optimizer, compressor = cases.train_together(kind, DDP, steps=3, calibration=mine)
        assert compressor.history[0].changed
        cases.assert_identical_everywhere(cases.fingerprint(model.module, optimizer))
    with pytest.raises(DataError, match="on any rank"):
        cases.train_together("lru", DDP, steps=3, calibration=[])


@check
def the_old_wrapper_raises(folder):
    tokens = torch.zeros(2, 5, dtype=torch.long)
    model = DDP(cases.make("lru"))
    optimizer = cases.adam(model)
    compressor = compressm.Compressor(model, optimizer, **cases.arguments(schedule=compressm.At([1])))
    assert compressor.rewrap() is model
    compressor.step()
    with pytest.raises(ModelError, match=r"compressor\.rewrap\(\)"):
        model(tokens)
    with pytest.raises(ModelError, match=r"compressor\.rewrap\(\)"):
        compressor.step()
    assert compressor.step_count == 1
    new = compressor.rewrap()
    assert new is not model
    assert new is compressor.rewrap()
    assert new.module is model.module
    with pytest.raises(ModelError, match=r"compressor\.rewrap\(\)"):
        model(tokens)
    del model
    cases.step(new, optimizer, cases.batches(2, 2, seed=dist.get_rank())[0])
    cases.assert_identical_everywhere([p.grad.numpy().tobytes() for p in new.parameters()])
    compressor.step()


@check
def options_and_hooks_survive(folder):
    chosen = {"find_unused_parameters": True, "gradient_as_bucket_view": True, "bucket_cap_mb": 3.0}
    model = DDP(cases.make("lru"), **chosen, process_group=dist.new_group([0, 1]))
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    model.broadcast_buffers = False
    model.eval()
    optimizer = cases.adam(model)
    compressor = compressm.Compressor(model, optimizer, **cases.arguments(schedule=compressm.At([1])))
    compressor.step()
    new = compressor.rewrap()
    assert all(getattr(new, name) == value for name, value in chosen.items() if name != "bucket_cap_mb")
    assert new.bucket_bytes_cap == 3 << 20
    assert new.process_group is model.process_group
    assert not new.broadcast_buffers
    assert not new.training
    assert new._comm_hooks == [(default_hooks.allreduce_hook, None)]
    assert DDP(cases.make("lru")).bucket_bytes_cap_default
    static = DDP(cases.make("lru"), static_graph=True)
    compressor = compressm.Compressor(static, cases.adam(static), **cases.arguments(schedule=compressm.At([1])))
    compressor.step()
    assert compressor.rewrap().static_graph
    assert compressor.rewrap().bucket_bytes_cap_default


@check
def wrappers_that_cannot_be_built_again_are_refused(folder):
    def refused(model, match, optimizer=None):
        with pytest.raises((ModelError, OptimizerError), match=match):
            compressm.Compressor(model, optimizer, **cases.arguments())

    model = DDP(cases.make("lru"))
    optimizer = cases.adam(model)
    compressor = compressm.Compressor(model, optimizer, **cases.arguments(schedule=compressm.At([1])))
    model.register_comm_hook(powerSGD_hook.PowerSGDState(None, 1), powerSGD_hook.powerSGD_hook)
    with pytest.raises(ModelError, match="communication hook"):
        compressor.step()  # nothing has been touched
    assert compressor.ranks == {"layers.0": 9, "layers.1": 7}
    refused(model, "communication hook")
    model = DDP(cases.make("lru"))
    model.register_forward_hook(lambda *_: None)
    refused(model, "hooks on the wrapper")
    refused(torch.compile(DDP(cases.make("lru"))), r"DistributedDataParallel\(torch.compile")
    refused(nn.Sequential(DDP(cases.make("lru"))), "wrapped in DistributedDataParallel")
    model = DDP(cases.make("lru"))
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=1e-2)
    refused(model, "ZeroRedundancyOptimizer", zero)
    inside = DDP(torch.compile(cases.make("lru"), backend="eager"))
    assert compressm.Compressor(inside, None, **cases.arguments()).ranks == {"layers.0": 9, "layers.1": 7}


@check
def averages_follow(folder):
    model = DDP(cases.make("mamba"))
    ema = torch.optim.swa_utils.AveragedModel(model.module)
    optimizer = cases.adam(model)
    calibration = cases.own(cases.batches(2, 2, seed=3))
    options = cases.arguments(schedule=compressm.At([2]), calibration=calibration, ema=ema)
    compressor = compressm.Compressor(model, optimizer, **options)
    for tokens in cases.batches(3, 4, seed=dist.get_rank()):
        cases.step(model, optimizer, tokens)
        ema.update_parameters(model.module)
        compressor.step()
        model = compressor.rewrap()
    assert ema.module.layers[0].d_state == model.module.layers[0].d_state < 7
    cases.assert_identical_everywhere([p.detach().numpy().tobytes() for p in ema.parameters()])


@check
def rank_0_saves(folder):
    _, model, optimizer, compressor = cases.train_together("mamba", DDP, steps=4)
    if dist.get_rank() == 0:
        compressm.save(folder / "c.safetensors", model, optimizer=optimizer, compressor=compressor)
    dist.barrier()
    fresh = cases.make("mamba")
    again = cases.adam(fresh)
    calibration = cases.own(cases.batches(4, 4, seed=5))
    compressm.load(folder / "c.safetensors", fresh, optimizer=again)
    fresh = DDP(fresh)
    resumed = compressm.Compressor(fresh, again, **cases.arguments(calibration=calibration))
    resumed.load_state_dict(compressor.state_dict())
    assert cases.fingerprint(fresh.module, again) == cases.fingerprint(model.module, optimizer)
    for tokens in cases.batches(cases.STEPS, 8, seed=1)[4:]:
        tokens = tokens.chunk(2)[dist.get_rank()]
        first, second = cases.step(model, optimizer, tokens), cases.step(fresh, again, tokens)
        assert first == second
        compressor.step(), resumed.step()
        model, fresh = compressor.rewrap(), resumed.rewrap()
    assert cases.fingerprint(fresh.module, again) == cases.fingerprint(model.module, optimizer)


@check
def a_guard_undoes_on_every_process(folder):
    """Rank 0's metric decides; the wrapper must be built anew after a rollback as well."""
    calls = []

    def evaluate(model):  # grows on rank 0 only, and is quite another number elsewhere
        calls.append(model)
        return float(len(calls)) if dist.get_rank() == 0 else 0.5

    guard = compressm.Rollback(evaluate, recovery=2, jump=None, failures=1)
    model = DDP(cases.make("lru"))
    optimizer = cases.adam(model)
    options = cases.arguments(calibration=cases.own(cases.batches(2, 2, seed=3)), schedule=compressm.At([2]), guard=guard)
    compressor = compressm.Compressor(model, optimizer, **options)
    before, outcomes = None, []
    for tokens in cases.batches(5, 4, seed=1):
        cases.step(model, optimizer, cases.own(tokens))
        if compressor.step_count == 1:
            before = before or cases.fingerprint(model.module, optimizer)
        if (report := compressor.step()) is not None:
            outcomes.append(getattr(report, "outcome", "reduced"))
            if outcomes[-1] == "rolled back":
                assert compressor.ranks == {"layers.0": 9, "layers.1": 7}
                assert cases.fingerprint(model.module, optimizer) == before
            with pytest.raises(ModelError, match="rewrap"):
                model(tokens)
        model = compressor.rewrap()
    assert outcomes == ["reduced", "rolled back"]
    cases.assert_identical_everywhere(cases.fingerprint(model.module, optimizer))


@check
def a_refused_attempt_leaves_the_wrapper_as_it_was(folder):
    """Its gradient buckets hold the parameters that are back: the same wrapper trains on."""
    guard = compressm.Rollback(lambda model: float(12 - model.layers[0].d_state), recovery=1, tries=1)
    model = DDP(cases.make("lru"))
    optimizer = cases.adam(model)
    options = cases.arguments(policy=compressm.FixedRank(2), schedule=compressm.At([2]), guard=guard)
    compressor = compressm.Compressor(model, optimizer, **options)
    parameters, reports = list(model.parameters()), []
    for tokens in cases.batches(4, 4, seed=1):
        cases.step(model, optimizer, tokens[dist.get_rank() :: 2])
        reports.append(compressor.step())
        assert compressor.rewrap() is model
    assert [report and report.outcome for report in reports] == [None, "refused", None, None]
    assert not reports[1].changed
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    cases.assert_identical_everywhere(cases.fingerprint(model.module, optimizer))


class Thing:
    """Without a repr of its own: the standard one says its address."""


class Hooked(torch.optim.AdamW):
    """Keeps objects beside its moments."""


@check
def objects_that_are_the_same_but_for_their_address(folder):
    class Mine(compressm.compression.LayerPolicy):
        def rank(self, spectrum):
            return 3

        def __repr__(self):
            return f"Mine({Thing()})"

    model = DDP(cases.make("lru"))
    optimizer = Hooked(model.parameters(), lr=1e-2)
    cases.step(model, optimizer, cases.batches(1, 4, seed=1)[0])
    compressm.compression.register_optimizer_state(Hooked, {"hook": "keep"})
    padding = [Thing() for _ in range(1 + 1000 * dist.get_rank())]
    for parameter in model.parameters():
        optimizer.state[parameter]["hook"] = {"things": [Thing(), {"a", "b", "c", "d"}], "moments": [torch.ones(2)]}
    compressor = compressm.Compressor(model, optimizer, **cases.arguments(policy=Mine(), schedule=compressm.At([1])))
    assert compressor.step().changed
    assert len(padding) > 0
    cases.step(compressor.rewrap(), optimizer, cases.batches(1, 4, seed=1)[0])


if __name__ == "__main__":
    launch.main([*CHECKS, *ddp_agreement_checks.CHECKS], Path(sys.argv[1]))
