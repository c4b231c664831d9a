"""Mamba models in training: optimizer, EMA and checkpoints follow; one rank for all layers; kernels in the report."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import compressm
from compressm.errors import ArgumentError
from compressm.layers import LRU, Mamba


class Model(nn.Module):
    """Tokens to logits through two residual Mamba layers of different excitation."""

    def __init__(self, d_state=8):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(Mamba(8, d_state=d_state, layer_idx=i) for i in range(2))
        self.head = nn.Linear(8, 16)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def train(model, optimizer, steps, compressor=None, ema=None, seed=0):
    draw = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(16, (4, 25), generator=draw).cumsum(1) % 16
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.update_parameters(model)
        if compressor is not None:
            compressor.step()
        losses.append(loss.item())
    return losses


def setup(d_state=8, **options):
    torch.manual_seed(0)
    model = Model(d_state)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    calibration = [torch.randint(16, (8, 24), generator=torch.Generator().manual_seed(1)).cumsum(1) % 16]
    options = {"policy": compressm.FixedRank(3), "schedule": compressm.At([5]), "calibration": calibration, **options}
    return model, optimizer, compressm.Compressor(model, optimizer, **options)


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_shrinks_in_training(recipe):
    model, optimizer, compressor = setup(recipe=recipe)
    train(model, optimizer, 12, compressor)
    (report,) = compressor.history
    assert report.ranks == {"layers.0": 3, "layers.1": 3}
    for layer in model.layers:
        assert layer.d_state == 3
        assert layer.x_proj.weight.shape == (7, 16)
        assert optimizer.state[layer.x_proj.weight]["exp_avg"].shape == (7, 16)
        assert optimizer.state[layer.A_log]["exp_avg_sq"].shape == (16, 3)
        assert optimizer.state[layer.A_log]["step"] == 12
        assert layer.A_log._no_weight_decay
    assert "N=8" not in report.layers[0].kernel_plan_after
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


def test_moments_of_kept_rows_stay():
    model, optimizer, compressor = setup()
    train(model, optimizer, 4, compressor)
    tokens = torch.zeros(2, 5, dtype=torch.long)
    model(tokens).sum().backward()
    optimizer.step()
    old = {k: v.clone() for k, v in optimizer.state[model.layers[0].x_proj.weight].items()}
    A_log = model.layers[0].A_log.detach().clone()
    compressor.step()
    layer = model.layers[0]
    kept = [int((A_log - column[:, None]).abs().sum(0).argmin()) for column in layer.A_log.detach().T]
    rows = [0, *(1 + n for n in kept), *(9 + n for n in kept)]
    new = optimizer.state[layer.x_proj.weight]
    torch.testing.assert_close(new["exp_avg"], old["exp_avg"][rows])
    torch.testing.assert_close(new["exp_avg_sq"], old["exp_avg_sq"][rows])


def test_average_follows():
    model, optimizer, _ = setup()
    ema = torch.optim.swa_utils.AveragedModel(model)
    _, _, compressor = setup()
    compressor = compressm.Compressor(
        model, optimizer, policy=compressm.FixedRank(3), schedule=compressm.At([1]), ema=ema,
        calibration=[torch.randint(16, (8, 24))],
    )  # fmt: skip
    with torch.no_grad():
        for p, q in zip(ema.module.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    model(torch.zeros(2, 5, dtype=torch.long)).sum().backward()
    compressor.step()
    for p, q in zip(ema.module.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    train(model, optimizer, 2, ema=ema)


def test_resumes_from_a_checkpoint(tmp_path):
    model, optimizer, compressor = setup()
    train(model, optimizer, 8, compressor)
    compressm.save(tmp_path / "c.safetensors", model, optimizer=optimizer, compressor=compressor)
    straight = train(model, optimizer, 5, compressor, seed=1)
    fresh, again, resumed = setup()
    compressm.load(tmp_path / "c.safetensors", fresh, optimizer=again, compressor=resumed)
    assert fresh.layers[0].d_state == 3
    assert fresh.layers[0].x_proj.out_features == 7
    assert train(fresh, again, 5, resumed, seed=1) == straight


@pytest.mark.parametrize(("uniform", "expected"), [(False, [2, 5]), (True, [5, 5])])
def test_one_rank_for_all_layers(uniform, expected):
    model, optimizer, compressor = setup(policy=compressm.FixedRank({"layers.0": 2, "layers.1": 5}), uniform=uniform)
    train(model, optimizer, 5, compressor)
    assert [layer.d_state for layer in model.layers] == expected


def test_failed_reductions_change_nothing():
    model, optimizer, compressor = setup()
    train(model, optimizer, 4, compressor)
    with torch.no_grad():
        model.layers[1].A_log[0, 0] = torch.inf
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(compressm.CompressmError, match="A_log"):
        compressor.step()
    assert [layer.d_state for layer in model.layers] == [8, 8]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_paper_s_recipe_is_data_free_for_lti_layers_only():
    optimizer = None
    options = {"policy": compressm.FixedRank(2), "schedule": compressm.At([1]), "recipe": "paper"}
    with pytest.raises(ArgumentError, match="data-free for these layers"):
        compressm.Compressor(LRU(2, 4), optimizer, **options, calibration=[torch.zeros(1, 3, 2)])
    mixed = nn.Sequential(LRU(4, 4), Mamba(4, d_state=4))
    compressor = compressm.Compressor(mixed, optimizer, **options, calibration=[torch.randn(2, 9, 4)])
    assert [(layer.convention, layer.gramians) for layer in compressor.plan().layers] == [
        ("complex", "data-free"),
        ("mean-LTI", "data"),
    ]
