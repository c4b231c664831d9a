"""What a reduction makes of optimizer state, against the definitions of the optimizers and against true gradients."""

from __future__ import annotations

import math

import pytest
import torch
from mixed_runs import Mixed, compressor_of, loss_of, train
from optimizer_kinds import build, edits_of
from torch import optim

from compressm.adapters import find_layers
from compressm.compression.planning.plans import Calibration, analyse
from compressm.compression.surgery.edits import apply_edits
from compressm.compression.surgery.moments import new_states
from compressm.control import SelectiveReduction


def tall(model, name="layers.0"):
    """A float64 model's LRU layer, an edit of it, and squared gradients of rank one for its matrices."""
    edits, layers = edits_of(model)
    return layers[name][0], edits[name]


def test_factored_second_moments_keep_row_and_column_means():
    """For squared gradients of rank one Adafactor's factors say everything: those of the carried matrix come out."""
    model = Mixed(("lru", "mamba"), dtype=torch.float64)
    optimizer = optim.Adafactor(model.parameters())
    train(model, [optimizer], 2)
    for layer in ("layers.0", "layers.1"):
        module, edit = tall(model, layer)
        full = {}
        for key in edit.tensors:
            p = module.get_parameter(key)
            state = optimizer.state[p]
            if p.ndim == 1:
                full[key] = state["variance"]
                continue
            rows, columns = torch.rand(p.shape[0], 1).double() + 0.1, torch.rand(1, p.shape[1]).double() + 0.1
            full[key] = rows * columns
            state["row_var"], state["col_var"] = full[key].mean(1, keepdim=True), full[key].mean(0, keepdim=True)
        old = {key: module.get_parameter(key) for key in edit.tensors}
        states, unknown = new_states(optimizer, old, edit, "transport")
        carried = edit.second_moments(full)
        assert not unknown
        for key, state in states.items():
            assert state["step"] == 2
            if old[key].ndim == 1:
                torch.testing.assert_close(state["variance"], carried[key])
            else:
                torch.testing.assert_close(state["row_var"], carried[key].mean(1, keepdim=True))
                torch.testing.assert_close(state["col_var"], carried[key].mean(0, keepdim=True))


def test_adafactor_of_transformers():
    """Its factors lack the reduced dimension, and its first moment is optional."""
    optimization = pytest.importorskip("transformers.optimization")
    if not hasattr(optimization, "Adafactor"):
        pytest.skip("this transformers has no Adafactor")
    model = Mixed()
    optimizer = optimization.Adafactor(
        model.parameters(), lr=1e-2, relative_step=False, scale_parameter=False, warmup_init=False, beta1=0.9
    )
    compressor = compressor_of(model, optimizer)
    losses = train(model, [optimizer], 6, compressor)
    weight = model.layers[1].x_proj.weight
    assert optimizer.state[weight]["exp_avg_sq_row"].shape == weight.shape[:1]
    assert optimizer.state[weight]["exp_avg_sq_col"].shape == weight.shape[1:]
    assert optimizer.state[weight]["step"] == 6
    assert all(math.isfinite(loss) for loss in losses)


def test_magnitudes_averages_and_restarts():
    """Adamax's infinity norm follows like the root of a second moment, ASGD's average like the parameter."""
    model = Mixed(("lru",), dtype=torch.float64)
    for name, slot, expected in (
        ("adamax", "exp_inf", lambda edit, full: {k: v.sqrt() for k, v in edit.second_moments(_squares(full)).items()}),
        ("adagrad", "sum", lambda edit, full: edit.second_moments(full)),
        ("asgd", "ax", lambda edit, full: edit.values(full)),
        ("rmsprop", "momentum_buffer", lambda edit, full: {k: torch.zeros_like(v) for k, v in edit.tensors.items()}),
        ("lion named", "exp_avg", lambda edit, full: edit.first_moments(full)),
    ):
        optimizer = build(model, name)
        train(model, [optimizer], 3)
        module, edit = tall(model)
        old = {key: module.get_parameter(key) for key in edit.tensors}
        full = {key: optimizer.state[p][slot].double() for key, p in old.items()}
        states, unknown = new_states(optimizer, old, edit, "transport")
        assert not unknown
        assert states.keys() == old.keys()
        for key, value in expected(edit, full).items():
            torch.testing.assert_close(states[key][slot], value, msg=lambda text, at=(name, key): f"{at}: {text}")


def _squares(tensors):
    return {key: value.square() for key, value in tensors.items()}


def test_sliced_factors():
    model = Mixed(("mamba",))
    optimizer = optim.Adafactor(model.parameters())
    train(model, [optimizer], 2)
    module, edit = tall(model)
    old = {key: module.get_parameter(key) for key in edit.tensors}
    states, _ = new_states(optimizer, old, edit, "slice")
    state = optimizer.state[module.A_log]
    product = state["row_var"] * state["col_var"] / state["row_var"].mean()
    kept = edit.subset("A_log", product)
    torch.testing.assert_close(states["A_log"]["row_var"], kept.mean(1, keepdim=True))
    torch.testing.assert_close(states["A_log"]["col_var"], kept.mean(0, keepdim=True))


ORDER = torch.tensor([3, 1, 5, 0, 4, 2])


def reordered() -> SelectiveReduction:
    """A Mamba layer of six states with all of them, in another order."""
    return SelectiveReduction(ORDER, torch.eye(6, dtype=torch.float64)[ORDER], "obs", 0.0)


def gradients(model, names):
    loss_of(model, 7).backward()
    found = {key: model.layers[0].get_parameter(key).grad.double() for key in names}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", ["lru", "mamba"])
def test_gradients_are_carried_to_the_gradients_of_the_new_parameters(kind):
    """All states kept, in another basis: the carried first moment is the gradient that the reduced layer really has."""
    model = Mixed((kind,), states=6, dtype=torch.float64)
    layers = find_layers(model)
    module, adapter = layers["layers.0"]
    if kind == "lru":
        reduction = analyse(model, layers, "real", Calibration())["layers.0"].analysis.reduce(6)
    else:
        reduction = reordered()
    edit = adapter.edit(module, reduction)
    old = {key: module.get_parameter(key).detach().clone() for key in edit.tensors}
    before, loss = gradients(model, edit.tensors), loss_of(model, 7).detach()
    with torch.no_grad():
        for key, value in edit.tensors.items():
            module.get_parameter(key).copy_(value)
    assert any(not torch.allclose(old[key], value) for key, value in edit.tensors.items())
    torch.testing.assert_close(loss_of(model, 7).detach(), loss)
    after, carried = gradients(model, edit.tensors), edit.first_moments(before)
    for key in edit.tensors:
        error = float((carried[key] - after[key]).norm() / after[key].norm())
        assert error < 1e-7, (key, error)


def test_the_step_of_adam_follows_a_permutation_of_the_states():
    """Mamba with all states kept: what changes is their order, and Adam's next step is the same one, reordered."""
    results = []
    for reorder in (False, True):
        torch.manual_seed(0)
        model = Mixed(("mamba",), states=6, dtype=torch.float64)
        optimizer = optim.Adam(model.parameters(), lr=1e-2)
        train(model, [optimizer], 3)
        layers = find_layers(model)
        module, adapter = layers["layers.0"]
        if reorder:
            apply_edits(model, {"layers.0": adapter.edit(module, reordered())}, layers, optimizers=[optimizer])
        train(model, [optimizer], 3, first=3)
        results.append(module.A_log.detach())
    torch.testing.assert_close(results[1], results[0][:, ORDER], rtol=1e-12, atol=0)
