"""Modules that take the weights of other ranks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import compressm
from compressm.errors import ArgumentError, ModelError, OptimizerError
from compressm.integrations import resize_on_load
from compressm.layers import LRU, Mamba, Mamba2


class Net(nn.Module):
    def __init__(self, lru, mamba):
        super().__init__()
        self.inner = nn.Sequential(LRU(4, lru), Mamba(4, d_state=mamba))

    def forward(self, x):
        return self.inner(x)


def test_layers_and_optimizers_take_the_ranks_of_the_weights():
    small, large = Net(3, 2), Net(8, 6)
    optimizer, told = torch.optim.Adam(large.parameters()), []
    large(torch.randn(2, 5, 4)).sum().backward()
    optimizer.step()
    handle = resize_on_load(large, lambda: [optimizer], after=lambda: told.append(1))
    large.load_state_dict(small.state_dict())
    x = torch.randn(2, 7, 4)
    assert torch.equal(large(x), small(x))
    assert {id(p) for p in large.parameters()} == {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert large.inner[0].nu_log not in optimizer.state
    assert optimizer.state[large.inner[1].in_proj.weight]["step"] == 1
    large.load_state_dict(small.state_dict())
    assert told == [1]
    handle.remove()
    with pytest.raises(RuntimeError, match="size mismatch"):
        large.load_state_dict(Net(8, 6).state_dict())


def test_weights_may_come_in_parts():
    small, large = Net(3, 2), Net(8, 6)
    resize_on_load(large)
    state = small.state_dict()
    for names in (list(state)[::2], list(state)[1::2]):
        large.load_state_dict({name: state[name] for name in names}, strict=False)
    x = torch.randn(2, 7, 4)
    assert torch.equal(large(x), small(x))


@pytest.mark.parametrize("layer", [lambda rank: LRU(4, rank), lambda rank: Mamba(4, d_state=rank)])
def test_a_layer_by_itself_and_within_another_module(layer):
    large = layer(8)
    resize_on_load(large)
    large.load_state_dict(layer(3).state_dict())
    assert large.d_state == 3
    outer = nn.ModuleDict({"part": large})
    outer.load_state_dict(nn.ModuleDict({"part": layer(5)}).state_dict())
    assert large.d_state == 5


def test_other_mismatches_are_left_to_torch():
    large = Net(8, 6)
    resize_on_load(large)
    state = Net(3, 2).state_dict()
    state["inner.1.A_log"] = state["inner.1.A_log"][:5]
    with pytest.raises(RuntimeError, match=r"size mismatch for inner\.1\.A_log"):
        large.load_state_dict(state)
    assert large.inner[1].d_state == 6


class TestResizeTo:
    """The public call."""

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("assign", [True, False])
    def test_then_load_state_dict_takes_it(self, tmp_path, strict, assign):
        small, large = Net(3, 2), Net(8, 6)
        torch.save(small.state_dict(), tmp_path / "small.pt")
        state = torch.load(tmp_path / "small.pt")
        if not strict:
            del state["inner.1.in_proj.weight"]
            state["more"] = torch.zeros(1)
        assert compressm.resize_to(large, state) is large
        assert large.inner[1].x_proj.out_features == small.inner[1].x_proj.out_features
        large.load_state_dict(state, strict=strict, assign=assign)
        x = torch.randn(2, 7, 4)
        assert torch.equal(large.inner[0](x), small.inner[0](x))
        assert torch.equal(large(x), small(x)) == strict

    def test_optimizers_follow(self):
        def run(states):
            torch.manual_seed(1)
            model = Net(*states)
            return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

        def step(model, optimizer):
            optimizer.zero_grad()
            model(torch.ones(2, 5, 4)).sum().backward()
            optimizer.step()

        (small, optimizer), (large, other) = run((3, 2)), run((8, 6))
        step(small, optimizer)
        step(large, other)
        compressm.resize_to(large, small.state_dict(), optimizer=other).load_state_dict(small.state_dict())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        step(small, optimizer)
        step(large, other)
        for (name, p), q in zip(small.named_parameters(), large.parameters(), strict=True):
            assert torch.equal(p, q), name

    def test_layers_that_are_not_there_stay(self):
        model, state = Net(8, 6), Net(3, 2).inner[1].state_dict(prefix="inner.1.")
        before = model.inner[0].nu_log
        compressm.resize_to(model, state)
        assert model.inner[0].nu_log is before
        assert model.inner[1].d_state == 2

    def test_config_of_transformers(self):
        transformers = pytest.importorskip("transformers")

        def build(states):
            config = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "state_size": states}
            return transformers.MambaForCausalLM(transformers.MambaConfig(**config)).eval()

        small, large = build(3), build(8)
        compressm.resize_to(large, small.state_dict()).load_state_dict(small.state_dict())
        x = torch.randint(11, (2, 5))
        assert torch.equal(large(x).logits, small(x).logits)
        assert large.config.state_size == 3

    def test_a_compiled_model(self):
        small, large = (torch.compile(Net(*states), backend="eager") for states in ((3, 2), (8, 6)))
        compressm.resize_to(large, small.state_dict()).load_state_dict(small.state_dict())
        x = torch.randn(2, 7, 4)
        assert torch.equal(large(x), small(x))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: {f"net.{k}": v for k, v in state.items()}, r"such as 'inner\.0\.nu_log', got names such as 'net\."),
            (lambda state: {"model": state, "epoch": 3}, r"got names such as 'model', 'epoch'"),
            (lambda state: {}, r"got an empty one"),
            (lambda state: state | {"inner.1.A_log": torch.zeros(7, 2)}, r"shapes that the layer has.*inner\.1\.A_log of"),
            (lambda state: state | {"inner.0.B_re": torch.zeros(3, 5)}, r"inner\.0\.B_re of shape \(3, 5\)"),
            (lambda state: state | {"inner.0.nu_log": torch.zeros(0)}, r"inner\.0\.nu_log of shape \(0,\)"),
            (lambda state: {k: v for k, v in state.items() if "C_im" not in k}, r"all of layer 'inner\.0', also inner\.0\.C"),
            (lambda state: list(state), r"expected a mapping of names to tensors, got list"),
        ],
    )
    def test_refusals(self, change, message):
        model = Net(8, 6)
        before = list(model.parameters())
        with pytest.raises(ArgumentError, match=message):
            compressm.resize_to(model, change(Net(3, 2).state_dict()))
        assert all(p is q for p, q in zip(model.parameters(), before, strict=True))

    @pytest.mark.parametrize(
        ("options", "change", "message"),
        [
            ({}, {"in_proj.weight": None}, r"all of layer '', also in_proj\.weight"),
            ({}, {"conv1d.bias": None}, r"all of layer '', also conv1d\.bias"),
            ({}, {"conv1d.weight": torch.zeros(13, 1, 4)}, r"conv1d\.weight of shape \(13, 1, 4\)"),
            ({}, {"conv1d.weight": torch.zeros(8, 1, 4), "conv1d.bias": torch.zeros(8)}, r"conv1d\.bias of shape \(8,\)"),
            ({}, {"in_proj.weight": torch.zeros(26, 5)}, r"in_proj\.weight of shape \(26, 5\)"),
            ({"d_features": 6}, {"B_map": None}, r"all of layer '', also B_map"),
            ({"d_features": 6}, {"C_map": torch.zeros(1, 2, 6)}, r"B_map of shape \(1, 3, 6\), C_map of shape \(1, 2, 6\)"),
            ({"d_features": 6}, {"B_map": torch.zeros(1, 3, 5)}, r"B_map of shape \(1, 3, 5\)"),
            ({"d_features": 6}, {"B_map": torch.tensor(1.0)}, r"B_map of shape \(\)"),
        ],
    )
    def test_half_a_mamba2_is_refused(self, options, change, message):
        small, model = (Mamba2(4, d_state=n, headdim=4, **options) for n in (3, 5))
        state = {key: value for key, value in (small.state_dict() | change).items() if value is not None}
        before = list(model.parameters())
        with pytest.raises(ArgumentError, match=message):
            compressm.resize_to(model, state)
        assert all(p is q for p, q in zip(model.parameters(), before, strict=True))
        assert model.conv1d.groups == model.conv1d.weight.shape[0]

    def test_optimizers_and_models_that_do_not_fit(self):
        model, state = Net(8, 6), Net(3, 2).state_dict()
        before = list(model.parameters())
        with pytest.raises(OptimizerError, match="does not hold"):
            compressm.resize_to(model, state, optimizer=torch.optim.SGD(Net(8, 6).parameters(), lr=0.1))
        with pytest.raises(ModelError, match="DataParallel"):
            compressm.resize_to(nn.DataParallel(model), state)
        with pytest.raises(ModelError, match="no state-space layer"):
            compressm.resize_to(nn.Linear(2, 2), state)
        assert all(p is q for p, q in zip(model.parameters(), before, strict=True))
