"""Mamba-2 models in training, all forms: optimizer, EMA, checkpoints and the guard follow; mixers of other libraries too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import compressm
from compressm.errors import ArgumentError
from compressm.layers import Mamba2

# How a layer is built, and what it is asked to become: "given maps" gets them by the reduction.
FORMS = {"strict": ({}, "strict"), "projected": ({"d_features": 8}, "auto"), "given maps": ({}, "projected")}


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


def setup(kind="strict", **options):
    torch.manual_seed(0)
    built, asked = FORMS[kind]
    model = Model(**built)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {"policy": compressm.FixedRank(3), "schedule": compressm.At([5]), "calibration": [tokens(8, 24, 1)], **options}
    options.setdefault("form", asked)
    return model, optimizer, compressm.Compressor(model, optimizer, **options)


@pytest.mark.parametrize("form", FORMS)
def test_shrinks_in_training(form):
    model, optimizer, compressor = setup(form)
    losses = train(model, optimizer, 12, compressor)
    (report,) = compressor.history
    assert report.ranks == {"layers.0": 3, "layers.1": 3}
    method = "strict" if form == "strict" else "projected"
    assert all(layer.method.startswith(method) for layer in report.layers)
    assert losses[-1] < losses[4] + 0.3
    for layer in model.layers:
        assert layer.d_state == 3
        names = ["in_proj.weight", "conv1d.weight", "conv1d.bias"] if form == "strict" else ["B_map", "C_map"]
        for name in names:
            parameter = layer.get_parameter(name)
            assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
            assert optimizer.state[parameter]["step"] == (7 if form == "given maps" else 12)
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
        model, optimizer, policy=compressm.FixedRank(3), schedule=compressm.At([1]), ema=ema, calibration=[tokens(8, 24, 1)],
        form=FORMS[form][1],
    )  # fmt: skip
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
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(g["params"]) for g in other.param_groups]
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert model.layers[0].in_proj.out_features == len(model.layers[0].in_proj.weight)
    assert train(model, optimizer, 2, seed=1) == train(plain, other, 2, seed=1)


def test_our_layers_are_projected_and_those_of_others_strict():
    _, _, compressor = setup("strict", form="auto", schedule=compressm.At([1]))
    compressor.step()
    assert [layer.method for layer in compressor.history[0].layers] == ["projected, balanced pair"] * 2
    assert [layer.state_bytes_after for layer in compressor.history[0].layers] == [4 * (16 * 3 + 48 * 4)] * 2
    foreign = falcon()
    assert compressm.compress(foreign, compressm.FixedRank(8)).layers[0].method.startswith("strict")


def test_new_maps_change_no_output_and_join_their_neighbour():
    """Where nothing is lost; the group is the one without weight decay, and what is not trained gets maps that are not."""
    model, _, _ = setup("strict")
    layer = model.layers[0]
    layer.requires_grad_(False)
    still = [p for n, p in model.layers[1].named_parameters() if n in ("A_log", "D", "dt_bias")]
    rest = [p for p in model.parameters() if p.requires_grad and all(p is not other for other in still)]
    optimizer = torch.optim.AdamW([{"params": rest, "weight_decay": 0.1}, {"params": still, "weight_decay": 0.0}])
    with torch.no_grad():  # one state of each group is not read
        for mixer in model.layers:
            mixer.in_proj.weight[[50, 58]] = 0
            mixer.conv1d.bias[[34, 42]] = 0
    batch = tokens(2, 9, 3)
    compressor = compressm.Compressor(
        model, optimizer, policy=compressm.FixedRank(7), schedule=compressm.At([1]), calibration=[tokens(8, 24, 1)]
    )
    before = model(batch)
    compressor.step()
    torch.testing.assert_close(model(batch), before, rtol=1e-4, atol=1e-4)
    assert not layer.B_map.requires_grad
    assert model.layers[1].C_map.requires_grad
    assert [[p is model.layers[1].B_map for p in group["params"]].count(True) for group in optimizer.param_groups] == [0, 1]
    assert vars(model.layers[1].B_map)["_no_weight_decay"]


def test_maps_come_and_go_with_checkpoints(tmp_path):
    """Into a model without maps, and back out of one that has them."""
    model, optimizer, compressor = setup("given maps", schedule=compressm.At([2]))
    compressm.save(tmp_path / "full.safetensors", model, optimizer=optimizer, compressor=compressor)
    train(model, optimizer, 3, compressor)
    compressm.save(tmp_path / "reduced.safetensors", model, optimizer=optimizer)
    fresh, again, _ = setup("given maps")
    compressm.load(tmp_path / "reduced.safetensors", fresh, optimizer=again)
    batch = tokens(2, 9, 3)
    assert torch.equal(fresh(batch), model(batch))
    other = compressm.resize_to(Model(), model.state_dict())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(batch), model(batch))
    compressm.load(tmp_path / "full.safetensors", model, optimizer=optimizer, compressor=compressor)
    plain, _, _ = setup("given maps")
    assert torch.equal(model(batch), plain(batch))
    assert model.layers[0].B_map is None
    damaged = {name: value[:, :2] if name.endswith("B_map") else value for name, value in other.state_dict().items()}
    assert compressm.resize_to(plain, damaged).layers[0].B_map is None


def test_a_refused_reduction_leaves_no_maps():
    """Maps stand in the model while the edit is described; an error there takes them back."""
    guard = compressm.Rollback(lambda model: float(model.layers[0].d_state < 8), jump=0.1, tries=0, recovery=1)
    model, optimizer, compressor = setup("given maps", schedule=compressm.At([1]), guard=guard)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert compressor.step().outcome == "refused"
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p for group in optimizer.param_groups for p in group["params"]] == held


def test_forms_that_cannot_be():
    for form, message in (("dense", "'auto' or 'projected' or 'strict'"), (3, "form: expected")):
        with pytest.raises(ArgumentError, match=message):
            setup("strict", form=form)
    with pytest.raises(ArgumentError, match="that has maps"):
        setup("projected", form="strict")
    with pytest.raises(ArgumentError, match="accelerate_"):
        compressm.compress(falcon(), compressm.FixedRank(8), form="projected")
    model = Model().bfloat16()
    masters = {name: p.detach().float().requires_grad_() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(masters.values())
    compressm.compression.attach_masters(optimizer, model, masters)
    with pytest.raises(ArgumentError, match="attached master copies"):
        compressm.compress(model, compressm.FixedRank(3), optimizer=optimizer, form="projected")
    assert compressm.compress(model, compressm.FixedRank(3), optimizer=optimizer).layers[0].method.startswith("strict")


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
