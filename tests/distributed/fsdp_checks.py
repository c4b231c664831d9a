"""Checks of FSDP2 (fully_shard), run by every process of a launch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

import compressm
from compressm.compression.distributed.fsdp import sharded_parameters
from compressm.compression.saving.sharded import load_sharded, save_sharded
from compressm.errors import ArgumentError, CheckpointError, DataError, DistributedError, ModelError, NumericalError
from distributed import cases, launch

CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def by_layer(model, **options):
    """Every layer and the whole in a group of its own."""
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def assert_in_step(model, optimizer):
    """FSDP, module and optimizer hold the same DTensors, and every process its part."""
    places = sharded_parameters(model)
    parameters = list(model.parameters())
    assert {id(p) for p in parameters} == places.keys()
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in parameters]
    for parameter in parameters:
        for value in optimizer.state.get(parameter, {}).values():
            if value.dim():
                assert isinstance(value, DTensor)
                assert value.shape == parameter.shape
                assert value.to_local().shape == parameter.to_local().shape
                assert value.placements == parameter.placements


def matches_one_process(kind, wrap=by_layer, **options):
    losses, model, optimizer, compressor = cases.train_together(kind, wrap, **options)
    *alone, reference = cases.train_alone(kind, **options)
    assert compressor.ranks == reference.ranks
    assert all(report.changed for report in reference.history)
    cases.assert_same_run(losses, model, optimizer, *alone)
    cases.assert_identical_everywhere(cases.fingerprint(model, optimizer))
    assert_in_step(model, optimizer)
    assert compressor.rewrap() is model


@check
def lru_matches_one_process(folder):
    matches_one_process("lru")


@check
def mamba_matches_one_process(folder):
    matches_one_process("mamba")


@check
def mamba2_matches_one_process(folder):
    """Without maps they are cut strictly, as shards take no new parameters."""
    matches_one_process("mamba2", form="strict", policy=compressm.Shrink(0.3))
    _, model, _, _ = cases.train_together("mamba2", by_layer)
    assert all(layer.B_map is None for layer in model.layers)  # nor by themselves
    with pytest.raises(ArgumentError, match="with fully_shard"):
        cases.train_together("mamba2", by_layer, form="projected")


@check
def mamba2_with_maps_matches_one_process(folder):
    matches_one_process("mamba2 with maps")


@check
def other_ways_to_shard(folder):
    def blocks_only(model):
        for layer in model.layers:
            fully_shard(layer, reshard_after_forward=False)
        return model

    def hybrid(model):
        return by_layer(model, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("replica", "shard")))

    matches_one_process("lru", hybrid)
    matches_one_process("mamba", fully_shard)  # all in the root's group, which keeps parameters whole after a forward pass
    model = blocks_only(cases.make("mamba"))
    optimizer = cases.adam(model)
    calibration = cases.own(cases.batches(2, 2, seed=3))
    options = cases.arguments(schedule=compressm.At([1]), calibration=calibration)
    compressor = compressm.Compressor(model, optimizer, **options)
    cases.step(model, optimizer, cases.batches(1, 2, seed=1)[0])
    assert compressor.step().changed
    cases.step(model, optimizer, cases.batches(1, 2, seed=1)[0])


@check
def along_another_dimension(folder):
    def second(parameter):
        return Shard(1) if parameter.dim() == 2 and parameter.shape[1] % 2 == 0 else Shard(0)

    model = fully_shard(cases.make("mamba"), shard_placement_fn=second)
    optimizer = cases.adam(model)
    cases.step(model, optimizer, cases.batches(1, 2, seed=1)[0])
    with pytest.raises(ModelError, match=r"layers\.1\.A_log.*multiple_of=2"):
        compressm.Compressor(
            model, optimizer, **cases.arguments(policy=compressm.FixedRank(3), schedule=compressm.At([1]))
        ).step()
    assert_in_step(model, optimizer)
    options = cases.arguments(policy=compressm.FixedRank(4), schedule=compressm.At([1]))
    assert compressm.Compressor(model, optimizer, **options).step().ranks == {"layers.0": 4, "layers.1": 4}
    assert model.layers[1].A_log.placements == (Shard(1),)
    assert_in_step(model, optimizer)
    cases.step(model, optimizer, cases.batches(1, 2, seed=1)[0])


@check
def marks_and_frozen_parameters_stay(folder):
    plain = cases.make("mamba")
    plain.layers[0].A_log.requires_grad_(False)
    model = by_layer(plain)
    model.layers[1].A_log._no_weight_decay = True
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    compressor = compressm.Compressor(model, optimizer, **cases.arguments(schedule=compressm.At([1])))
    cases.step(model, optimizer, cases.batches(1, 2, seed=1)[0])
    assert compressor.step().changed
    assert not model.layers[0].A_log.requires_grad
    assert model.layers[1].A_log.requires_grad
    assert model.layers[1].A_log._no_weight_decay
    cases.step(model, optimizer, cases.batches(1, 2, seed=1)[0])


@check
def mixed_precision(folder):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for kind in ("lru", "mamba"):
        model = by_layer(cases.make(kind).float(), mp_policy=policy)
        optimizer = cases.adam(model)
        calibration = cases.own(cases.batches(2, 2, seed=3))
        options = cases.arguments(schedule=compressm.At([2]), calibration=calibration)
        compressor = compressm.Compressor(model, optimizer, **options)
        for tokens in cases.batches(4, 4, seed=dist.get_rank()):
            assert torch.isfinite(cases.step(model, optimizer, tokens))
            compressor.step()
        assert compressor.history[0].changed
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert_in_step(model, optimizer)


@check
def averages_in_a_dict_follow(folder):
    model = by_layer(cases.make("lru"))
    optimizer = cases.adam(model)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    compressor = compressm.Compressor(model, optimizer, **cases.arguments(schedule=compressm.At([1]), ema=ema))
    assert compressor.step().changed
    for name, parameter in model.named_parameters():
        assert ema[name].placements == parameter.placements
        torch.testing.assert_close(ema[name].full_tensor(), parameter.full_tensor())


@check
def calibration_batches_of_unequal_number(folder):
    mine = cases.batches(3 - dist.get_rank(), 2, seed=dist.get_rank())
    *_, model, optimizer, compressor = cases.train_together("lru", by_layer, steps=3, calibration=mine)
    assert compressor.history[0].changed
    cases.assert_identical_everywhere(cases.fingerprint(model, optimizer))
    with pytest.raises(DataError, match=r"rank\(s\) \[1\] got no batch"):
        cases.train_together("lru", by_layer, steps=3, calibration=[] if dist.get_rank() else mine)


@check
def fewer_sequences_than_processes(folder):
    *_, model, optimizer, compressor = cases.train_together("lru", by_layer, steps=3, sequences=1)
    assert compressor.history[0].changed
    cases.assert_identical_everywhere(cases.fingerprint(model, optimizer))


@check
def other_numbers_of_threads(folder):
    torch.set_num_threads(1 + dist.get_rank())
    try:
        *_, model, optimizer, compressor = cases.train_together("lru", by_layer, steps=3)
    finally:
        torch.set_num_threads(1)
    assert compressor.history[0].changed
    cases.assert_identical_everywhere(cases.fingerprint(model, optimizer))


@check
def bytes_gathered_are_those_of_the_formula(folder):
    """docs/scaling.md: what is read three times, what changes twice more for the moments; all float64 here."""
    model = by_layer(cases.make("mamba"))
    optimizer = cases.adam(model)
    cases.step(model, optimizer, cases.batches(1, 4, seed=1)[0])
    calibration = cases.own(cases.batches(2, 4, seed=5))
    options = cases.arguments(policy=compressm.FixedRank(3), schedule=compressm.At([1]), calibration=calibration)
    compressor = compressm.Compressor(model, optimizer, **options)
    gathered = []
    original = DTensor.full_tensor

    def counting(tensor, *args, **kwargs):
        gathered.append(tensor.numel() * tensor.element_size())
        return original(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DTensor, "full_tensor", counting)
        compressor.step()
    D, R = 6, 1
    changing = [8 * ((R + 2 * N) * D + D * N) for N in (7, 6)]
    assert sum(gathered) == sum(3 * (size + 8 * (D * R + D)) + 2 * size for size in changing)


@check
def a_late_failure_puts_the_earlier_layers_back(folder):
    from compressm.adapters.lru import LRUAdapter

    class Fails(LRUAdapter):
        def edit(self, module, reduction):
            if dist.get_rank() == 1:
                raise NumericalError("the second layer fails on rank 1")
            return super().edit(module, reduction)

    class Layer(compressm.layers.LRU):
        pass

    compressm.register_adapter(Layer, Fails())
    plain = cases.make("lru")
    plain.layers[1] = Layer(6, 7).double()
    model = by_layer(plain)
    optimizer = cases.adam(model)
    for tokens in cases.batches(2, 4, seed=1):
        cases.step(model, optimizer, tokens)
    parameters, before = list(model.parameters()), cases.fingerprint(model, optimizer)
    options = cases.arguments(policy=compressm.FixedRank(3), schedule=compressm.At([1]))
    compressor = compressm.Compressor(model, optimizer, **options)
    expected = NumericalError if dist.get_rank() == 1 else DistributedError
    with pytest.raises(expected, match="the second layer fails on rank 1"):
        compressor.step()
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert cases.fingerprint(model, optimizer) == before
    assert_in_step(model, optimizer)
    cases.step(model, optimizer, tokens)


@check
def what_cannot_be_sharded_again_is_refused(folder):
    def refused(model, match, optimizer=None):
        with pytest.raises(ModelError, match=match):
            compressm.Compressor(model, optimizer, **cases.arguments())

    from torch.distributed.fsdp import CPUOffloadPolicy
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    refused(fully_shard(cases.make("lru"), offload_policy=CPUOffloadPolicy(pin_memory=False)), "offloaded to the CPU")
    mesh = init_device_mesh("cpu", (2,))
    refused(parallelize_module(cases.make("lru"), mesh, {"head": ColwiseParallel()}), "tensor parallelism")
    model = by_layer(cases.make("lru"))
    for function in (lambda: compressm.compress(model, compressm.FixedRank(2)), lambda: compressm.inspect(model)):
        with pytest.raises(ModelError, match="wrapped in fully_shard"):
            function()
    assert isinstance(model, FSDPModule)


@check
def a_changed_torch_is_noticed(folder):
    from compressm.compression.distributed import fsdp

    model = by_layer(cases.make("lru"))
    known = fsdp.KNOWN
    fsdp.KNOWN = (*known, "an_attribute_of_tomorrow")
    try:
        with pytest.raises(ModelError, match=r"keeps fully_shard's parameters in another way.*an_attribute_of_tomorrow"):
            compressm.Compressor(model, None, **cases.arguments())
    finally:
        fsdp.KNOWN = known


@check
def sharded_checkpoints_resume(folder):
    _, model, optimizer, compressor = cases.train_together("lru", by_layer, steps=4)
    save_sharded(folder / "shards", model, optimizer=optimizer, compressor=compressor, extra={"epoch": 3})
    fresh = by_layer(cases.make("lru"))
    again = cases.adam(fresh)
    options = cases.arguments(calibration=cases.own(cases.batches(4, 4, seed=5)))
    resumed = compressm.Compressor(fresh, again, **options)
    assert load_sharded(folder / "shards", fresh, optimizer=again, compressor=resumed) == {"epoch": 3}
    assert cases.fingerprint(fresh, again) == cases.fingerprint(model, optimizer)
    assert_in_step(fresh, again)
    assert cases.progress(resumed) == cases.progress(compressor)
    for tokens in cases.batches(cases.STEPS, 8, seed=1)[4:]:
        tokens = tokens.chunk(2)[dist.get_rank()]
        assert cases.step(model, optimizer, tokens) == cases.step(fresh, again, tokens)
        compressor.step(), resumed.step()
    assert cases.fingerprint(fresh, again) == cases.fingerprint(model, optimizer)
    plain = cases.make("lru")  # every process for itself, not sharded
    own = cases.adam(plain)
    load_sharded(folder / "shards", plain, optimizer=own)
    assert [layer.d_state for layer in plain.layers] == [resumed.history[0].ranks[f"layers.{i}"] for i in range(2)]
    if dist.get_rank() == 0:
        torch.save(cases.contents(plain, own), folder / "contents.pt")


@check
def an_optimizer_that_is_not_passed_is_named(folder):
    """It holds the shards, which are replaced as whole parameters are."""
    model = by_layer(cases.make("lru"))
    optimizer = cases.adam(model)
    cases.step(model, optimizer, cases.batches(1, 4, seed=1)[0])
    compressor = compressm.Compressor(model, None, **cases.arguments(schedule=compressm.At([1])))
    with pytest.warns(compressm.compression.StaleCopyWarning, match=r"^AdamW holds layers\.0\.B_im"):
        assert compressor.step().changed
    assert optimizer.param_groups[0]["params"][1].shape[0] == 9


@check
def a_guard_is_refused(folder):
    model = by_layer(cases.make("lru"))
    with pytest.raises(ModelError, match="guard: got a Rollback"):
        compressm.Compressor(model, None, **cases.arguments(guard=compressm.Rollback(lambda model: 1.0, recovery=1)))


@check
def sharded_checkpoints_of_other_models_are_refused(folder):
    model = by_layer(cases.make("lru"))
    optimizer = cases.adam(model)
    before = cases.fingerprint(model, optimizer)
    with pytest.raises((CheckpointError, DistributedError), match="not empty"):
        save_sharded(folder / "shards", model)
    with pytest.raises(CheckpointError, match=r"has no compressm\.json"):
        load_sharded(folder, model)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_sharded(folder / "shards", by_layer(cases.Net("lru", d_model=5)))
    with pytest.raises(CheckpointError, match="other parameters"):
        load_sharded(folder / "shards", model, optimizer=torch.optim.SGD([model.head.weight], lr=1.0))
    with pytest.raises(ArgumentError, match="recipe"):
        load_sharded(folder / "shards", model, compressor=compressm.Compressor(model, None, **cases.arguments(recipe="paper")))
    assert cases.fingerprint(model, optimizer) == before


if __name__ == "__main__":
    launch.main(CHECKS, Path(sys.argv[1]))
