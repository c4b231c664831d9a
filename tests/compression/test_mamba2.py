"""Mamba-2 models in training, both forms: optimizer, EMA, checkpoints and the guard follow; mixers of other libraries too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import compressm
from compressm.layers import Mamba2

FORMS = {"strict": {}, "projected": {"d_features": 8}}


class Model(nn.Module):
    """Tokens to logits through two residual Mamba-2 layers."""

    def __init__(self, **options):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(Mamba2(8, d_state=8, headdim=4, ngroups=2, layer_idx=i, **options) for i in range(2))
        self.head = nn.Linear(8, 16)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def tokens(count, length, seed):
    return torch.randint(16, (count, length), generator=torch.Generator().manual_seed(seed)).cumsum(1) % 16


def train(model, optimizer, steps, compressor=None, ema=None, seed=0):
    losses = []
    for step in range(steps):
        batch = tokens(4, 25, 1000 * seed + step)
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.update_parameters(model)
        if compressor is not None:
            compressor.step()
        losses.append(loss.item())
    return losses


def setup(form="strict", **options):
    torch.manual_seed(0)
    model = Model(**FORMS[form])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {"policy": compressm.FixedRank(3), "schedule": compressm.At([5]), "calibration": [tokens(8, 24, 1)], **options}
    return model, optimizer, compressm.Compressor(model, optimizer, **options)


@pytest.mark.parametrize("form", FORMS)
def test_shrinks_in_training(form):
    model, optimizer, compressor = setup(form)
    losses = train(model, optimizer, 12, compressor)
    (report,) = compressor.history
    assert report.ranks == {"layers.0": 3, "layers.1": 3}
    assert all(layer.method.startswith(form) for layer in report.layers)
    assert losses[-1] < losses[4] + 0.3
    for layer in model.layers:
        assert layer.d_state == 3
        names = {"strict": ["in_proj.weight", "conv1d.weight", "conv1d.bias"], "projected": ["B_map", "C_map"]}[form]
        for name in names:
            parameter = layer.get_parameter(name)
            assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
            assert optimizer.state[parameter]["step"] == 12
        states = layer.allocate_inference_cache(1)
        assert states[1].shape == (1, 4, 4, 3)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("form", FORMS)
def test_twice_and_resumed_from_a_checkpoint(form, tmp_path):
    policy = compressm.Shrink(0.5)
    model, optimizer, compressor = setup(form, policy=policy, schedule=compressm.At([3, 7]))
    train(model, optimizer, 8, compressor)
    assert [layer.d_state for layer in model.layers] == [2, 2]
    compressm.save(tmp_path / "c.safetensors", model, optimizer=optimizer, compressor=compressor)
    straight = train(model, optimizer, 3, compressor, seed=1)
    fresh, again, resumed = setup(form, policy=policy, schedule=compressm.At([3, 7]))
    compressm.load(tmp_path / "c.safetensors", fresh, optimizer=again, compressor=resumed)
    assert [layer.d_state for layer in fresh.layers] == [2, 2]
    assert fresh.layers[0].in_proj.out_features == len(fresh.layers[0].in_proj.weight)
    assert train(fresh, again, 3, resumed, seed=1) == straight


@pytest.mark.parametrize("form", FORMS)
def test_average_follows(form):
    model, optimizer, _ = setup(form)
    ema = torch.optim.swa_utils.AveragedModel(model)
    compressor = compressm.Compressor(
        model, optimizer, policy=compressm.FixedRank(3), schedule=compressm.At([1]), ema=ema, calibration=[tokens(8, 24, 1)]
    )
    compressor.step()
    batch = tokens(2, 9, 3)
    torch.testing.assert_close(ema(batch), model(batch))
    train(model, optimizer, 2, ema=ema)


@pytest.mark.parametrize("form", FORMS)
def test_the_guard_takes_it_back(form):
    guard = compressm.Rollback(
        lambda model: float(model.layers[0].d_state < 8), tolerance=0.1, jump=None, recovery=2, failures=1
    )
    model, optimizer, compressor = setup(form, guard=guard, schedule=compressm.At([2]))
    train(model, optimizer, 3, compressor)
    assert model.layers[0].d_state == 3
    train(model, optimizer, 1, compressor)
    assert compressor.step_count == 2
    plain, other, _ = setup(form)
    train(plain, other, 2)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert model.layers[0].in_proj.out_features == len(model.layers[0].in_proj.weight)
    assert train(model, optimizer, 2, seed=1) == train(plain, other, 2, seed=1)


def falcon():
    transformers = pytest.importorskip("transformers")
    config = transformers.FalconH1Config(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=4, mamba_n_heads=4, mamba_d_head=4, mamba_d_ssm=16, mamba_d_state=16, mamba_n_groups=2, mamba_chunk_size=8,
        ssm_multipliers=[0.5, 2.0, 0.7, 1.3, 0.9], pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.FalconH1ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            for parameter in (layer.mamba.in_proj.weight, layer.mamba.conv1d.weight):
                parameter.normal_()
    return model


def test_buffers_follow_and_come_back():
    """FalconH1's multipliers lie in a buffer that no checkpoint has."""
    guard = compressm.Rollback(
        lambda model: float(model.model.layers[0].mamba.ssm_state_size), tolerance=0.1, mode="max", jump=None, recovery=1
    )
    model = falcon()
    optimizer, ema = torch.optim.AdamW(model.parameters()), torch.optim.swa_utils.AveragedModel(model).double()
    compressor = compressm.Compressor(
        model, optimizer, policy=compressm.FixedRank(8), schedule=compressm.At([1]), calibration=[tokens(4, 9, 0)], guard=guard,
        ema=ema,
    )  # fmt: skip
    batch = tokens(2, 9, 3)
    with torch.no_grad():
        before = model(batch).logits
        vector = model.model.layers[0].mamba.mup_vector.clone()
        compressor.step()
        for layer in (model.model.layers[0].mamba, ema.module.model.layers[0].mamba):
            assert layer.mup_vector.shape == (1, 1, 68)
            assert layer.groups_time_state_size == 16
        assert model.model.layers[0].mamba.mup_vector is not ema.module.model.layers[0].mamba.mup_vector
        torch.testing.assert_close(ema(batch).logits, model(batch).logits.double(), rtol=1e-4, atol=1e-4)
        assert not torch.equal(model(batch).logits, before)
        compressor.step()
        assert torch.equal(model.model.layers[1].mamba.mup_vector, vector)
        assert torch.equal(model(batch).logits, before)
        assert ema.module.model.layers[0].mamba.mup_vector.dtype == torch.float64
        torch.testing.assert_close(ema(batch).logits, before.double(), rtol=1e-4, atol=1e-4)


def test_hybrids_train_on_and_are_saved(tmp_path):
    """Attention beside the scans is left alone; the config says the new size, and the library loads the result."""
    from compressm.integrations.transformers import update_config

    model = falcon()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compressor = compressm.Compressor(
        model, optimizer, policy=compressm.FixedRank(8), schedule=compressm.At([2]), calibration=[tokens(4, 9, 0)]
    )
    for step in range(4):
        batch = tokens(4, 9, step)
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        compressor.step()
    assert set(compressor.ranks) == {"model.layers.0.mamba", "model.layers.1.mamba"}
    update_config(model)
    assert model.config.mamba_d_state == 8
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    batch = tokens(2, 9, 7)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(batch).logits, model(batch).logits)
        generated = again.generate(batch[:1], max_new_tokens=4, do_sample=False)
        assert torch.equal(generated, model.generate(batch[:1], max_new_tokens=4, do_sample=False, use_cache=False))
