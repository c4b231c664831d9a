"""Surgery: everything changes together, or nothing does."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from compressm.adapters import find_layers
from compressm.adapters.lru import NAMES
from compressm.compression import FixedRank, UnknownStateWarning, compress
from compressm.compression.planning.plans import Calibration, analyse, make_plan
from compressm.compression.surgery.edits import apply_edits, reshape
from compressm.compression.surgery.references import References
from compressm.errors import ArgumentError, ModelError, OptimizerError

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "sgd plain": (torch.optim.SGD, {}),
    "adam": (torch.optim.Adam, {}),
    "adam amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "adamw foreach": (torch.optim.AdamW, {"foreach": True}),
    "adamw fused": (torch.optim.AdamW, {"fused": True}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {}),
}


def edits_for(model: nn.Module, rank: int = 3):
    layers = find_layers(model)
    planned = make_plan(analyse(model, layers, "real", Calibration()), FixedRank(rank))
    return {name: layers[name][1].edit(layers[name][0], r) for name, r in planned.reductions.items()}, layers


def operate(run, **kwargs) -> None:
    edits, layers = edits_for(run.model)
    apply_edits(run.model, edits, layers, **({"optimizers": [run.optimizer]} | kwargs))


def states(run) -> dict[str, dict]:
    return {name: dict(run.optimizer.state[p]) for name, p in run.model.named_parameters() if p in run.optimizer.state}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_go_on_with_transported_state(training, name):
    cls, options = OPTIMIZERS[name]
    run = training(cls, **options)
    optimizer, before = run.optimizer, states(run)
    edits, layers = edits_for(run.model)
    apply_edits(run.model, edits, layers, optimizers=[optimizer])
    assert run.model.lrus[0].d_state == run.model.lrus[1].d_state == 3
    after = states(run)
    assert after.keys() == before.keys()
    for layer, edit in edits.items():
        old = {key: before.get(f"{layer}.{key}", {}) for key in NAMES}
        for slot, carry in (
            ("exp_avg", edit.first_moments), ("momentum_buffer", edit.first_moments),
            ("exp_avg_sq", edit.second_moments), ("max_exp_avg_sq", edit.second_moments),
        ):  # fmt: skip
            if slot in old["B_re"]:
                carried = carry({key: state[slot].double() for key, state in old.items()})
                for key in NAMES:
                    assert torch.equal(after[f"{layer}.{key}"][slot], carried[key]), (layer, key, slot)
        for key in NAMES:
            state = after.get(f"{layer}.{key}", {})
            assert state.keys() == old[key].keys()
            assert state.get("step") == old[key].get("step")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.model.parameters()}
    weight = run.model.lrus[0].B_re.detach().clone()
    run.step(2)
    assert not torch.equal(weight, run.model.lrus[0].B_re)
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_groups_keep_their_order_and_options(make_net):
    """The usual split: no weight decay for dynamics, marked by an attribute; a smaller learning rate for them."""
    model = make_net()
    for name in ("nu_log", "theta_log", "gamma_log"):
        for lru in model.lrus:
            lru.get_parameter(name)._no_weight_decay = True
    dynamics = [n for n, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)]
    others = [n for n, _ in model.named_parameters() if n not in dynamics]
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [named[n] for n in others], "weight_decay": 0.1},
            {"params": [named[n] for n in reversed(dynamics)], "weight_decay": 0.0, "lr": 1e-4},
        ],
        lr=1e-2,
    )
    groups = [id(group) for group in optimizer.param_groups]
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    edits, layers = edits_for(model)
    apply_edits(model, edits, layers, optimizers=[optimizer])
    names = {id(p): n for n, p in model.named_parameters()}
    assert [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups] == [others, dynamics[::-1]]
    assert [id(group) for group in optimizer.param_groups] == groups
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == options
    assert [n for n, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)] == dynamics


def test_frozen_parameters_stay_frozen_and_gradients_are_dropped(training):
    run = training()
    lru = run.model.lrus[0]
    lru.D.requires_grad_(False)
    lru.theta_log.requires_grad_(False)
    untouched = {n: (p, p.grad) for n, p in run.model.named_parameters() if n.split(".")[-1] not in NAMES}
    assert lru.B_re.grad is not None
    operate(run)
    assert not lru.theta_log.requires_grad
    assert lru.nu_log.requires_grad
    assert all(p.grad is None for n, p in run.model.named_parameters() if n not in untouched)
    for name, (parameter, grad) in untouched.items():
        assert run.model.get_parameter(name) is parameter
        assert parameter.grad is grad


def test_dtypes_stay(training):
    run = training(dtype=torch.float32)
    operate(run)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert {s["exp_avg"].dtype for s in states(run).values()} == {torch.float32}
    run.step()


def test_learning_rate_schedulers_keep_working(training):
    run = training(torch.optim.SGD, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 1, gamma=0.5)
    run.step()
    scheduler.step()
    operate(run)
    before = run.model.lrus[1].C_re.detach().clone()
    run.step()
    scheduler.step()
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    assert torch.allclose(run.model.lrus[1].C_re, before - 0.05 * run.model.lrus[1].C_re.grad, rtol=1e-12)


def test_unknown_optimizer_state_is_reset_with_a_warning(training):
    run = training(torch.optim.Rprop)
    before = states(run)
    with pytest.warns(UnknownStateWarning, match=r"Rprop keeps state \(prev, step_size\).*moments='reset'") as caught:
        operate(run)
    assert len(caught) == 1
    assert set(states(run)) == {name for name in before if name.split(".")[-1] not in NAMES}


def test_unknown_state_under_an_adam_is_reset_as_well(training):
    class Odd(torch.optim.Adam):
        pass

    run = training(Odd)
    for parameter in run.model.lrus[0].parameters():
        run.optimizer.state[parameter]["preconditioner"] = torch.eye(3)
    with pytest.warns(UnknownStateWarning, match=r"Odd keeps state \(preconditioner\)"):
        operate(run)
    assert run.model.lrus[0].B_re not in run.optimizer.state
    assert run.model.lrus[1].B_re in run.optimizer.state
    run.step()


def test_a_warning_turned_into_an_error_changes_nothing(training, snapshot):
    run = training(torch.optim.Rprop)
    before = snapshot(run.model, run.optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnknownStateWarning):
            operate(run)
    before.check()


def test_reset_and_slice(training):
    run = training()
    before = states(run)
    operate(run, moments="slice")
    for name, state in states(run).items():
        for slot in ("exp_avg", "exp_avg_sq"):
            window = tuple(slice(0, size) for size in run.model.get_parameter(name).shape)
            assert torch.equal(state[slot], before[name][slot][window])
            assert state["step"] == before[name]["step"]
    run = training()
    operate(run, moments="reset")
    assert {name.split(".")[-1] for name in states(run)}.isdisjoint(NAMES)
    run.step()
    assert run.optimizer.state[run.model.lrus[0].B_re]["step"] == 1


def test_moments_held_by_two_optimizers_are_carried_together(training, make_net):
    """gamma's gradient follows from those of B, which another optimizer holds."""
    whole = training()
    model = make_net()
    model.load_state_dict(whole.model.state_dict())
    dynamics = [p for n, p in model.named_parameters() if n.split(".")[-1] in ("nu_log", "theta_log", "gamma_log")]
    rest = [p for p in model.parameters() if all(p is not d for d in dynamics)]
    pair = [torch.optim.Adam(group, lr=1e-2) for group in (dynamics, rest)]
    for name, p in model.named_parameters():
        owner = pair[0] if any(p is d for d in dynamics) else pair[1]
        owner.state[p] = copy.deepcopy(states(whole)[name])
    operate(whole)
    edits, layers = edits_for(model)
    apply_edits(model, edits, layers, optimizers=pair)
    for name, state in states(whole).items():
        p = model.get_parameter(name)
        held = pair[0].state.get(p) or pair[1].state[p]
        for slot in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(held[slot], state[slot]), (name, slot)


def test_no_step_count_without_second_moment(training):
    """B frozen: nothing says how large gamma's new gradients are, so Adam must start it afresh."""
    run = training(steps=0)
    for lru in run.model.lrus:
        lru.B_re.requires_grad_(False)
        lru.B_im.requires_grad_(False)
    run.step(2)
    operate(run)
    assert run.model.lrus[0].gamma_log not in run.optimizer.state
    assert run.optimizer.state[run.model.lrus[0].C_re]["step"] == 2
    before = run.model.lrus[0].gamma_log.detach().clone()
    run.step()
    assert float((run.model.lrus[0].gamma_log.detach() - before).abs().max()) < 1.01e-2


def test_ema_follows_as_module_and_as_dict(training):
    run = training()
    averaged = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    run.step()
    averaged.update_parameters(run.model)
    shadow = {name: p.detach().clone() for name, p in averaged.module.named_parameters()}
    edits, layers = edits_for(run.model)
    oracle = {name: edit.values({key: shadow[f"{name}.{key}"].double() for key in NAMES}) for name, edit in edits.items()}
    twin = copy.deepcopy(run.model)
    apply_edits(run.model, edits, layers, optimizers=[run.optimizer], ema=averaged)
    twin_edits, twin_layers = edits_for(twin)
    apply_edits(twin, twin_edits, twin_layers, ema=shadow)
    for name, values in oracle.items():
        for key, value in values.items():
            assert torch.equal(averaged.module.get_parameter(f"{name}.{key}"), value)
            assert torch.equal(shadow[f"{name}.{key}"], value)
            assert not isinstance(shadow[f"{name}.{key}"], nn.Parameter)
    run.step()
    averaged.update_parameters(run.model)
    assert all(torch.isfinite(p).all() for p in averaged.parameters())


@pytest.mark.parametrize("ema", ["self", "missing", "shape", "kind", "structure"])
def test_wrong_ema_changes_nothing(training, snapshot, ema):
    run = training()
    shadow = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    if ema == "missing":
        del shadow["lrus.1.C_im"]
    elif ema == "shape":
        shadow["lrus.1.C_im"] = torch.zeros(2, 2)
    given = {"self": run.model, "kind": 3, "structure": nn.Linear(1, 1)}.get(ema, shadow)
    before = snapshot(run.model, run.optimizer)
    with pytest.raises(ArgumentError, match="ema"):
        operate(run, ema=given)
    before.check()


class Fragile(dict):
    """An EMA store that gives way at one key."""

    def __setitem__(self, key, value):
        if key == "lrus.1.C_im" and value.shape[1] == 3:
            raise KeyboardInterrupt
        super().__setitem__(key, value)


@pytest.mark.parametrize("moments", ["transport", "reset", "slice"])
def test_a_failure_in_the_middle_leaves_everything_as_it_was(training, snapshot, moments):
    run = training(amsgrad=True)
    shadow = Fragile({name: p.detach().clone() for name, p in run.model.named_parameters()})
    before = snapshot(run.model, run.optimizer, ema=shadow)
    with pytest.raises(KeyboardInterrupt):
        operate(run, ema=shadow, moments=moments)
    before.check()


def test_an_audit_that_finds_a_fault_undoes_everything(training, snapshot):
    """A group whose list swallows assignments keeps the dead parameter, which the audit sees after the last change."""

    class Stubborn(list):
        def __setitem__(self, index, value):
            pass

    run = training()
    group = run.optimizer.param_groups[0]
    group["params"] = Stubborn(group["params"])
    before = snapshot(run.model, run.optimizer)
    with pytest.raises(OptimizerError, match=r"optimizer: lost lrus\.0\.B_im"):
        operate(run)
    before.check()


def test_shared_hooked_and_foreign_parameters_are_refused(training, snapshot):
    run = training()
    run.model.lrus[1].C_re = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    run.model.other = nn.Module()
    run.model.other.tied = run.model.lrus[0].C_re
    before = snapshot(run.model)
    with pytest.raises(ModelError, match=r"lrus\.0\.C_re is shared \(lrus\.0\.C_re, other\.tied\)"):
        operate(run, optimizers=[])
    before.check()
    run = training()
    handle = run.model.lrus[0].B_im.register_hook(lambda grad: grad)
    with pytest.raises(ModelError, match=r"lrus\.0\.B_im carries gradient hooks"):
        operate(run)
    handle.remove()
    run.model.lrus[0].B_im.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ModelError, match=r"lrus\.0\.B_im carries gradient hooks"):
        operate(run)

    class Sharded(nn.Parameter):
        pass

    run = training()
    run.model.lrus[0].nu_log = Sharded(run.model.lrus[0].nu_log.detach())
    with pytest.raises(ModelError, match=r"nu_log is a Sharded, expected a plain torch\.nn\.Parameter"):
        operate(run, optimizers=[])


def test_a_layer_used_twice_is_cut_once(training):
    run = training()
    run.model.lrus[1] = run.model.lrus[0]
    run.optimizer = torch.optim.Adam(run.model.parameters())
    run.step()
    operate(run)
    assert run.model.lrus[0] is run.model.lrus[1]
    assert run.model.lrus[0].d_state == 3
    run.step()


def test_reshape_and_back(training, snapshot):
    run = training()
    before = snapshot(run.model, run.optimizer)
    layers = find_layers(run.model)
    references = References(layers, [run.optimizer], None)
    reshape(run.model, layers, {"lrus.0": 2, "lrus.1": 6}, [run.optimizer])
    assert [lru.d_state for lru in run.model.lrus] == [2, 6]
    assert not run.model.lrus[0].B_re.any()
    assert run.model.lrus[0].B_re not in run.optimizer.state
    assert run.model.lrus[1].B_re in run.optimizer.state
    references.restore()
    before.check()


def test_one_shot_without_optimizer(make_net):
    model = make_net()
    report = compress(model, FixedRank({"lrus.0": 2}))
    assert report.ranks == {"lrus.0": 2, "lrus.1": 6}
    assert [lru.d_state for lru in model.lrus] == [2, 6]
