"""Every optimizer that people use, in a small training run with a reduction in the middle."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mixed_runs import Mixed, compressor_of, layer_parameters, loss_of, train
from optimizer_kinds import OPTIMIZERS, Lion, build, edits_of
from torch import nn
from torch import optim as O

import compressm
from compressm.compression import UnknownStateWarning, register_optimizer_state
from compressm.compression.surgery.audit import audit, check_optimizers, trained_names
from compressm.compression.surgery.optimizer_state import state_kinds
from compressm.errors import ArgumentError, OptimizerError


def state_signature(optimizer, parameter):
    """Key to kind of value, dtype and device of one parameter's state."""
    return {
        key: (value.dtype, value.device) if isinstance(value, torch.Tensor) else type(value)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on(name):
    model = Mixed()
    optimizer = build(model, name)
    compressor = compressor_of(model, optimizer)
    losses = train(model, [optimizer], 2, compressor)
    before = {key: (state_signature(optimizer, p), p) for key, p in layer_parameters(model).items()}
    losses += train(model, [optimizer], 1, compressor, first=2)
    after = layer_parameters(model)
    assert compressor.ranks == {"layers.0": 5, "layers.1": 5}
    for key, p in after.items():
        signature, old = before[key]
        assert p is not old
        assert old not in optimizer.state
        assert state_signature(optimizer, p) == signature, key
        for slot, value in optimizer.state.get(p, {}).items():
            if isinstance(value, torch.Tensor) and value.ndim == p.ndim > 0 and slot not in ("row_var", "col_var"):
                assert value.shape == p.shape, (key, slot)
            if slot == "step":
                assert value == 3
    values = {key: p.detach().clone() for key, p in after.items()}
    losses += train(model, [optimizer], 3, compressor, first=3)
    assert all(math.isfinite(loss) for loss in losses)
    assert all(not torch.equal(p, values[key]) for key, p in after.items())
    assert all(p.isfinite().all() for p in model.parameters())


def test_capturable_state_stays_on_its_device():
    """CPU steps with capturable=True are refused by torch; the state that it keeps (a device tensor) is carried."""
    model = Mixed(("lru",))
    optimizer = O.AdamW(model.parameters())
    train(model, [optimizer], 2)
    optimizer.param_groups[0]["capturable"] = True
    compressm.compress(model, compressm.FixedRank(5), optimizer=optimizer)
    for p in layer_parameters(model).values():
        assert optimizer.state[p]["step"] == 2
        assert optimizer.state[p]["step"].device == p.device
    assert optimizer.param_groups[0]["capturable"] is True


@pytest.mark.skipif(not hasattr(O, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("rest", ["adam", "adafactor"])
def test_muon_for_matrices_and_another_for_the_rest(rest):
    model = Mixed()
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    muon = O.Muon(matrices, lr=1e-2)
    optimizers = [muon, build(model, rest, others)]
    compressor = compressor_of(model, optimizers)
    losses = train(model, optimizers, 2, compressor) + train(model, optimizers, 1, first=2)
    lru = model.layers[0]
    B = {key: muon.state[lru.get_parameter(key)]["momentum_buffer"].double() for key in ("B_re", "B_im")}
    edits, _ = edits_of(model)
    C = {key: muon.state[lru.get_parameter(key)]["momentum_buffer"].double() for key in ("C_re", "C_im")}
    zeros = {key: torch.zeros_like(lru.get_parameter(key), dtype=torch.float64) for key in edits["layers.0"].tensors}
    expected = edits["layers.0"].first_moments({**zeros, **B, **C})
    compressor.step()
    for key in (*B, *C):
        new = lru.get_parameter(key)
        assert torch.equal(muon.state[new]["momentum_buffer"], expected[key].float())
    losses += train(model, optimizers, 3, first=3)
    assert all(math.isfinite(loss) for loss in losses)


# Optimizers nobody named.


def test_unnamed_state_is_reset_with_one_warning():
    model = Mixed()
    optimizer = Lion(model.parameters(), lr=1e-3)
    compressor = compressor_of(model, optimizer, schedule=compressm.At([2, 4]), policy=compressm.Shrink(0.5))
    with pytest.warns(UnknownStateWarning, match=r"Lion keeps state \(exp_avg\).*register_optimizer_state\(Lion") as caught:
        losses = train(model, [optimizer], 2, compressor)
    assert len(caught) == 1
    assert all(p not in optimizer.state for p in layer_parameters(model).values())
    assert model.head.weight in optimizer.state
    losses += train(model, [optimizer], 4, compressor, first=2)  # a second reduction, no second warning
    assert len(compressor.history) == 2
    assert all(math.isfinite(loss) for loss in losses)


def test_a_warning_that_was_raised_comes_again():
    model = Mixed(("lru",))
    optimizer = Lion(model.parameters())
    train(model, [optimizer], 1)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UnknownStateWarning):
                compressm.compress(model, compressm.FixedRank(5), optimizer=optimizer)
    assert model.layers[0].d_state == 16


def test_reset_says_nothing():
    model = Mixed()
    optimizer = Lion(model.parameters())
    compressor = compressor_of(model, optimizer, moments="reset")
    train(model, [optimizer], 5, compressor)
    assert compressor.history[0].changed


def test_named_state_along_the_classes_and_in_wrappers():
    class Cautious(O.AdamW):
        pass

    register_optimizer_state(Cautious, {"trust": "zero", "exp_avg_sq": "keep"})
    model = nn.Linear(2, 2)
    kinds = state_kinds(Cautious(model.parameters()))
    assert kinds == {"exp_avg": "first", "exp_avg_sq": "keep", "max_exp_avg_sq": "second", "trust": "zero"}


def test_optimizers_that_accelerate_wraps():
    accelerate = pytest.importorskip("accelerate")
    model = Mixed(("lru",))
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = accelerator.prepare_optimizer(O.SGD(model.parameters(), lr=1e-2, momentum=0.9))
    assert type(optimizer) is not O.SGD
    losses = train(model, [optimizer], 2)
    compressm.compress(model, compressm.FixedRank(5), optimizer=optimizer)
    assert all("momentum_buffer" in optimizer.state[p] for p in layer_parameters(model).values())
    losses += train(model, [optimizer], 2, first=2)
    assert all(math.isfinite(loss) for loss in losses)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("target", "kinds", "match"),
    [
        ("Lion", {"exp_avg": "first"}, "target: expected a class or a qualified name"),
        (Lion, {"exp_avg": "moment"}, r"kinds\['exp_avg'\]: expected one of first, second"),
        (Lion, ["exp_avg"], "kinds: expected a mapping"),
        (Lion, {"rows": "second-rows"}, "expected one 'second-rows' and one 'second-columns'"),
    ],
)
def test_wrong_names(target, kinds, match):
    with pytest.raises(ArgumentError, match=match):
        register_optimizer_state(target, kinds)
    assert state_kinds(Lion(nn.Linear(1, 1).parameters())) == {}


def test_lbfgs_is_refused():
    model = Mixed()
    with pytest.raises(OptimizerError, match="LBFGS keeps one flat history"):
        compressor_of(model, O.LBFGS(model.parameters()))


# The ways people train.


def test_groups_decay_and_frozen_layers_with_clipping_and_accumulation():
    model = Mixed()
    model.encoder.requires_grad_(False)
    model.layers[0].theta_log.requires_grad_(False)
    model.layers[1].A_log.requires_grad_(False)
    decay = [p for p in model.parameters() if p.ndim == 2 and not getattr(p, "_no_weight_decay", False)]
    rest = [p for p in model.parameters() if all(p is not d for d in decay)]
    optimizer = O.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 1e-4}], lr=1e-2)
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    marked = {name for name, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked
    scheduler = O.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    compressor = compressor_of(model, optimizer)
    for step in range(6):
        for micro in range(2):
            (loss_of(model, 2 * step + micro) / 2).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        compressor.step()
        assert norm.isfinite()
    assert compressor.ranks == {"layers.0": 5, "layers.1": 5}
    assert [len(group["params"]) for group in optimizer.param_groups] == sizes
    assert {name for name, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)} == marked
    assert not model.layers[0].theta_log.requires_grad
    assert model.layers[1].A_log not in optimizer.state
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2 / 64, 1e-4 / 64]
    assert scheduler.optimizer is optimizer
    audit(model, [optimizer])


def test_a_layer_module_in_two_places():
    model = Mixed(("lru", "mamba"))
    model.layers.append(model.layers[0])
    model.layers.append(model.layers[1])
    optimizer = O.AdamW(model.parameters(), lr=1e-2)
    compressor = compressor_of(model, optimizer)
    losses = train(model, [optimizer], 6, compressor)
    assert compressor.ranks == {"layers.0": 5, "layers.1": 5}
    assert model.layers[2] is model.layers[0]
    assert all(math.isfinite(loss) for loss in losses)


def test_unfrozen_after_the_compressor_was_built():
    """Trainable by now, but in no group: the reduction says so before it touches anything."""
    model = Mixed(("lru",))
    model.layers[0].B_re.requires_grad_(False)
    optimizer = O.AdamW([p for p in model.parameters() if p.requires_grad])
    compressor = compressor_of(model, optimizer, at=1)
    model.layers[0].B_re.requires_grad_(True)
    with pytest.raises(OptimizerError, match=r"does not hold 1 trainable.*layers\.0\.B_re"):
        compressor.step()
    assert model.layers[0].d_state == 16
    optimizer.add_param_group({"params": [model.layers[0].B_re]})
    compressor = compressor_of(model, optimizer, at=1)
    assert compressor.step().changed


# Any of it together.

FROZEN = ("layers.0.theta_log", "layers.0.B_re", "layers.0.C_im", "layers.1.A_log", "layers.1.x_proj.weight", "encoder.bias")


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(sorted(OPTIMIZERS)),
    kinds=st.sampled_from([("lru", "mamba"), ("mamba", "lru"), ("lru", "lru"), ("mamba", "mamba")]),
    frozen=st.sets(st.sampled_from(FROZEN)),
    split=st.integers(1, 3),
    moments=st.sampled_from(["transport", "reset", "slice"]),
    rank=st.sampled_from([1, 3, 15]),
    seed=st.integers(0, 3),
)
def test_any_combination_passes_the_audit_and_trains_on(name, kinds, frozen, split, moments, rank, seed):
    torch.manual_seed(seed)
    model = Mixed(kinds)
    for key, p in model.named_parameters():
        p.requires_grad_(key not in frozen)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained[i::split]} for i in range(split)]
    optimizer = build(model, name, groups)
    compressor = compressor_of(model, optimizer, rank=rank, at=2, moments=moments)
    held = trained_names(model, [optimizer])
    losses = train(model, [optimizer], 4, compressor)
    assert compressor.ranks == {"layers.0": rank, "layers.1": rank}
    check_optimizers(compressor.layers, model, [optimizer])
    audit(model, [optimizer], trained=held)
    assert trained_names(model, [optimizer]) == held
    assert all(math.isfinite(loss) for loss in losses)
    assert all(p.isfinite().all() for p in model.parameters())
