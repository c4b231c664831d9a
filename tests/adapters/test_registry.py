"""Which adapter serves which layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import compressm
from compressm.adapters import LRUAdapter, find_layers, register_adapter, registry, supported_layers
from compressm.errors import ArgumentError, ModelError
from compressm.layers import LRU


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))


class Mystery(nn.Module):
    """Looks like a Mamba block."""

    def __init__(self):
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(3, 4))


class Mine(LRU):
    """A user's subclass."""


def test_finds_layers_in_the_model_s_order():
    model = nn.ModuleDict({"b": LRU(2, 3), "lin": nn.Linear(2, 2), "a": nn.Sequential(nn.ReLU(), Mine(2, 4))})
    found = find_layers(model)
    assert list(found) == ["b", "a.1"]
    assert found["a.1"][0] is model["a"][1]
    assert isinstance(found["a.1"][1], LRUAdapter)
    assert list(find_layers(LRU(2, 3))) == [""]


def test_shared_layer_is_found_once():
    layer = LRU(2, 3)
    assert list(find_layers(nn.Sequential(layer, layer))) == ["0"]


def test_unknown_state_space_layer_is_reported_with_the_way_out():
    model = nn.Sequential(LRU(2, 3), nn.Sequential(Mystery()))
    with pytest.raises(ModelError) as caught:
        find_layers(model)
    text = str(caught.value)
    for part in ("layer '1.0' (Mystery)", "A_log", "Mystery", "compressm.layers.lru.LRU", "register_adapter(cls, adapter)"):
        assert part in text
    assert list(find_layers(model, strict=False)) == ["0"]


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


def test_unknown_layer_with_parametrized_marks_is_reported():
    module = Mystery()
    parametrize.register_parametrization(module, "A_log", Double())
    with pytest.raises(ModelError, match="A_log"):
        find_layers(nn.Sequential(module))


def test_ordinary_modules_are_no_suspects():
    model = nn.Sequential(nn.Linear(2, 2), nn.GRU(2, 2), nn.MultiheadAttention(2, 1), nn.BatchNorm1d(2))
    assert find_layers(model) == {}


def test_user_adapter_by_class_and_by_name():
    class Mine2(LRUAdapter):
        pass

    adapter = Mine2()
    compressm.register_adapter(Mystery, adapter)
    name = registry.qualified_name(Mystery)
    assert name in supported_layers()
    assert find_layers(Mystery())[""][1] is adapter
    register_adapter(name, None)
    assert name not in supported_layers()
    assert find_layers(nn.Sequential(Mystery())) == {}


def test_the_closest_class_of_the_mro_wins():
    special = LRUAdapter()
    register_adapter(Mine, special)
    assert find_layers(Mine(2, 3))[""][1] is special
    assert find_layers(LRU(2, 3))[""][1] is not special


def test_nothing_is_searched_inside_a_registered_layer():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Mystery()

    register_adapter(Outer, None)
    assert find_layers(nn.Sequential(Outer(), LRU(2, 3))).keys() == {"1"}


def test_wrong_registrations():
    with pytest.raises(ArgumentError, match="adapter: expected an Adapter instance or None, got the class LRUAdapter"):
        register_adapter(Mystery, LRUAdapter)
    for target in ("Mystery", 3):
        with pytest.raises(ArgumentError, match="target: expected a class or a qualified name"):
            register_adapter(target, LRUAdapter())
