"""Mixed precision, low-precision parameters with float32 masters, and averaged copies, with a reduction in the middle."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from mixed_runs import Mixed, batch, compressor_of, layer_parameters, loss_of, train
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import compressm
from compressm.compression import attach_masters, register_optimizer_state
from compressm.errors import ArgumentError, OptimizerError


def test_gradient_scaler_and_autocast():
    """float32 parameters and autocast: the ordinary way to have masters.  An overflowing step is skipped, and goes on."""
    model = Mixed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    compressor = compressor_of(model, optimizer)
    x, y = batch(0)
    for step in range(6):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if step == 4:
            model.layers[0].B_re.grad.fill_(torch.inf)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        compressor.step()
        assert loss.isfinite()
    assert compressor.ranks == {"layers.0": 5, "layers.1": 5}
    assert scaler.get_scale() == 2.0**9
    for p in layer_parameters(model).values():
        assert p.dtype == torch.float32
        assert optimizer.state[p]["step"] == 5
        assert p.isfinite().all()


def test_parameters_in_bfloat16_with_state_in_float32():
    """State keeps the dtype that it had, also where it is not the parameter's."""
    model = Mixed().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    compressor = compressor_of(model, optimizer)
    loss_of(model, 0).backward()
    optimizer.step()
    for state in optimizer.state.values():
        state["exp_avg_sq"] = state["exp_avg_sq"].float()
    for _ in range(3):
        compressor.step()
    for p in layer_parameters(model).values():
        state = optimizer.state[p]
        assert (p.dtype, state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        assert state["exp_avg_sq"].shape == p.shape


class MasterSGD(torch.optim.Optimizer):
    """Keeps a float32 copy of every parameter in its state and trains that."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["master"] = p.detach().float().clone()
                state["master"].sub_(p.grad.float(), alpha=group["lr"])
                p.copy_(state["master"])


register_optimizer_state(MasterSGD, {"master": "master"})


class External:
    """The other way: the optimizer's groups hold float32 copies, and the loop carries gradients over and values back."""

    def __init__(self, model, **options):
        self.model = model
        self.masters = {name: nn.Parameter(p.detach().float()) for name, p in model.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.masters.values(), **options)
        attach_masters(self.optimizer, model, self.masters)

    def step(self):
        for name, p in self.model.named_parameters():
            self.masters[name].grad = None if p.grad is None else p.grad.float()
        self.optimizer.step()
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(self.masters[name])

    def zero_grad(self):
        self.model.zero_grad()


def reduced_in_float32(model, masters):
    """What the same cut makes of the masters: the model's edit, applied to copies in higher precision."""
    layers = compressm.adapters.find_layers(model)
    planned = compressm.compression.planning.plans.make_plan(
        compressm.compression.planning.plans.analyse(model, layers, "real", compressm.compression.planning.plans.Calibration()),
        compressm.FixedRank(5),
    )
    expected = {}
    for name, reduction in planned.reductions.items():
        module, adapter = layers[name]
        edit = adapter.edit(module, reduction)
        values = edit.values({key: masters[f"{name}.{key}"].detach().double() for key in edit.tensors})
        expected |= {f"{name}.{key}": value.float() for key, value in values.items()}
    return expected


@pytest.mark.parametrize("where", ["state", "outside"])
def test_bfloat16_parameters_with_float32_masters(where):
    model = Mixed().bfloat16()
    if where == "state":
        trainer = optimizer = MasterSGD(model.parameters())
    else:
        trainer = External(model, lr=1e-2)
        optimizer = trainer.optimizer

    def masters():
        if where == "outside":
            return {name: trainer.masters[name] for name in layer_parameters(model)}
        return {name: optimizer.state[p]["master"] for name, p in layer_parameters(model).items()}

    compressor = compressor_of(model, optimizer)
    losses = train(model, [trainer], 2, compressor) + train(model, [trainer], 1, first=2)
    old = masters()
    expected = reduced_in_float32(model, old)
    compressor.step()
    assert compressor.ranks == {"layers.0": 5, "layers.1": 5}
    for name, master in masters().items():
        p = model.get_parameter(name)
        assert master is not old[name]
        assert (master.dtype, p.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(master, expected[name])
        assert torch.equal(p, master.bfloat16())
        assert not torch.equal(p.float(), master), "bits below bfloat16 are kept"
        if where == "outside":
            assert any(master is q for q in optimizer.param_groups[0]["params"])
            assert isinstance(master, nn.Parameter)
            assert optimizer.state[master]["step"] == 3
            assert optimizer.state[master]["exp_avg_sq"].shape == master.shape
            assert old[name] not in optimizer.state
    losses += train(model, [trainer], 3, first=3)
    assert all(math.isfinite(loss) for loss in losses)
    assert all(torch.equal(model.get_parameter(name), master.bfloat16()) for name, master in masters().items())


def test_masters_that_were_not_announced():
    """The error says what the optimizer holds instead, and the way out."""
    model = Mixed(("lru",)).bfloat16()
    masters = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    with pytest.raises(OptimizerError, match=r"layers\.0\.nu_log.*float32 on cpu.*attach_masters"):
        compressor_of(model, torch.optim.Adam(masters))


def test_wrong_masters():
    model = Mixed(("lru",)).bfloat16()
    masters = {name: nn.Parameter(p.detach().float()) for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(masters.values())
    for change, match in (
        ({"decoder.weight": torch.zeros(2)}, r"masters: expected names as in model\.named_parameters\(\), got 'decoder"),
        ({"layers.0.nu_log": torch.zeros(2)}, r"masters\['layers\.0\.nu_log'\]: expected a tensor of shape \(16,\)"),
        ({"layers.0.nu_log": model.layers[0].nu_log}, "expected a copy of it, got the model's own parameter"),
    ):
        with pytest.raises(ArgumentError, match=match):
            attach_masters(optimizer, model, masters | change)
    with pytest.raises(ArgumentError, match="masters: expected a mutable mapping"):
        attach_masters(optimizer, model, list(masters))
    other = {name: nn.Parameter(p.detach().float()) for name, p in model.named_parameters()}
    with pytest.raises(OptimizerError, match=r"does not hold masters\['encoder\.weight'\]"):
        attach_masters(optimizer, model, other)


def test_a_failed_reduction_leaves_masters_as_they_were(monkeypatch):
    model = Mixed(("lru",)).bfloat16()
    trainer = External(model, lr=1e-2)
    train(model, [trainer], 2)
    masters, held = dict(trainer.masters), list(trainer.optimizer.param_groups[0]["params"])
    values = {name: master.detach().clone() for name, master in masters.items()}
    states = {name: trainer.optimizer.state[master] for name, master in masters.items()}

    class Full(dict):
        def __setitem__(self, key, value):
            if key == "layers.0.C_im" and value.shape[1] == 5:
                raise MemoryError
            super().__setitem__(key, value)

    ema = Full({name: p.detach().clone() for name, p in model.named_parameters()})
    with pytest.raises(MemoryError):
        compressm.compress(model, compressm.FixedRank(5), optimizer=trainer.optimizer, ema=ema)
    assert trainer.masters == masters
    assert all(a is b for a, b in zip(trainer.optimizer.param_groups[0]["params"], held, strict=True))
    assert all(torch.equal(masters[name], value) for name, value in values.items())
    assert all(trainer.optimizer.state[master] is states[name] for name, master in masters.items())


# Averaged copies.


@pytest.mark.parametrize("kind", ["AveragedModel", "deepcopy", "dict"])
def test_averaged_copies_follow(kind):
    model = Mixed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if kind == "AveragedModel":
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    elif kind == "deepcopy":
        ema = copy.deepcopy(model).requires_grad_(False)
    else:
        ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    scheduler = SWALR(optimizer, swa_lr=1e-3)

    @torch.no_grad()
    def update():
        scheduler.step()
        if kind == "AveragedModel":
            ema.update_parameters(model)
        else:
            averages = ema if kind == "dict" else dict(ema.named_parameters())
            for name, p in model.named_parameters():
                averages[name].lerp_(p, 0.1)

    compressor = compressor_of(model, optimizer, ema=ema)
    losses = train(model, [optimizer], 6, compressor, after=update)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    root = ema.module if kind == "AveragedModel" else ema
    averages = ema if kind == "dict" else dict(root.named_parameters())
    assert {name: value.shape for name, value in averages.items()} == shapes
    if kind != "dict":
        assert root.layers[1].d_state == root.layers[0].d_state == 5
        assert loss_of(root, 0).isfinite()
        assert not any(p.requires_grad for p in root.parameters()) or kind == "AveragedModel"
    assert scheduler.optimizer is optimizer
    assert all(math.isfinite(loss) for loss in losses)
