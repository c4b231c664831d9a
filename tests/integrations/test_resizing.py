"""Modules that take the weights of other ranks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from compressm.integrations import resize_on_load
from compressm.layers import LRU, Mamba


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


def test_no_framework_is_imported():
    code = """
import sys, compressm.integrations
assert not {"transformers", "lightning", "pytorch_lightning", "accelerate", "mamba_ssm"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
