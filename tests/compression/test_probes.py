"""Every output of a model is probed, and the same relative error counts the same in all of them."""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressm
from compressm.adapters import find_layers
from compressm.compression.planning.calibration import collect
from compressm.compression.planning.probes import output_tensors, probes
from compressm.errors import ArgumentError
from compressm.layers import LRU


@dataclass
class Fields:
    a: Any
    b: Any


Named = collections.namedtuple("Named", "a b")

CONTAINERS = {
    "tuple": lambda a, b: (a, b),
    "swapped": lambda a, b: [b, a],
    "dict": lambda a, b: {"seg": a, "regression": b},
    "namedtuple": Named,
    "dataclass": Fields,
    "object": lambda a, b: SimpleNamespace(a=a, b=b),
    "distribution": lambda a, b: [torch.distributions.Normal(a, 1.0), torch.distributions.Normal(b, 1.0)],
    "nested": lambda a, b: ({"a": [a]}, (Fields(None, (b, "words", 3)),)),
    "with records": lambda a, b: {"hidden_states": (1e6 * a,), "a": a, "b": b, "past_key_values": [1e6 * b]},
    "twice": lambda a, b: (a, b, a, b),
}


class Net(nn.Module):
    """Half of the states feed head a, half head b, whose outputs are of the same size times ``scale``."""

    def __init__(self, output, scale=1.0, widths=(2, 2)):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.lru = nn.Linear(3, 8), LRU(8, 16)
        self.a, self.b = (nn.Linear(8, width, bias=False) for width in widths)
        self.output = output
        with torch.no_grad():
            self.lru.D.zero_()
            self.a.weight[:, 4:], self.b.weight[:, :4] = 0, 0
            self.a.weight[:, :4].normal_()
            self.b.weight[:, 4:].normal_().mul_(10 * scale)
            for C in (self.lru.C_re, self.lru.C_im):
                C[:4, 8:], C[4:, :8] = 0, 0
                C[4:] *= 0.1

    def forward(self, x):
        h = self.lru(self.embed(x))
        return self.output(self.a(h), self.b(h))


def errors(output, scale=1.0, widths=(2, 2)):
    """Relative errors of head a and head b after a reduction to half of the states."""
    x, net = torch.randn(8, 64, 3, generator=torch.Generator().manual_seed(1)), Net(output, scale, widths)
    with torch.no_grad():
        h = net.lru(net.embed(x))
        before = net.a(h), net.b(h)
        assert compressm.compress(net, compressm.FixedRank(8), calibration=[x]).layers[0].gramians == "data"
        h = net.lru(net.embed(x))
        return [((new - old).norm() / old.norm()).item() for new, old in zip((net.a(h), net.b(h)), before, strict=True)]


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e-4])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_heads_are_measured_alike_whatever_holds_them(kind, scale):
    """The oracle: both heads in one tensor, of equal scale."""
    oracle = errors(lambda a, b: torch.cat([a, b / scale], -1), scale)
    assert max(errors(CONTAINERS[kind], scale)) < 1.5 * max(oracle)


@pytest.mark.parametrize("widths", [(2, 6), (6, 2), (1, 40)])
def test_heads_of_other_widths_are_measured_alike(widths):
    first, second = errors(lambda a, b: (a, b), widths=widths)
    assert 0.5 < first / second < 2


def test_masked_entries_do_not_count_as_size():
    """Policies hand out logits of which the forbidden ones are -1e9 or -inf."""
    for value in (-1e9, -math.inf, torch.finfo(torch.float32).min):
        mask = torch.zeros(2, dtype=torch.bool)
        mask[1] = True
        masked = errors(lambda a, b: (a, torch.cat([b, b[..., :1].masked_fill(mask[1], value)], -1)))  # noqa: B023
        assert max(masked) < 1.5 * max(errors(lambda a, b: torch.cat([a, b], -1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_output_has_a_probe_of_unit_variance(dtype):
    out = torch.randn(5, 7, dtype=dtype) * 30
    expected = torch.randn(5, 7, generator=torch.Generator().manual_seed(3)).to(dtype)
    (probe,) = probes([out], 3)
    assert torch.equal(probe, expected)


def test_scales():
    a, b = torch.randn(1000), 100 * torch.randn(1000)
    u, v = probes([a, b], 0)
    assert 50 < float(u.std() / v.std()) < 200
    for odd in (torch.zeros(3), torch.full((3,), math.nan)):
        u, v, w = probes([a, odd, b], 0)
        assert torch.isfinite(v).all()
        assert 50 < float(u.std() / w.std()) < 200


def kept(output: Any) -> list[float]:
    return sorted(float(tensor) for tensor in output_tensors(output))


def t(value: float) -> Tensor:
    return torch.tensor(value)


def test_what_counts_as_an_output():
    cache = SimpleNamespace(conv_states=t(7.0))
    assert kept({"loss": t(1.0), "logits": t(2.0)}) == [2.0]
    assert kept({"loss": t(1.0), "start_logits": t(2.0), "end_logits": t(3.0)}) == [2.0, 3.0]
    assert kept({"loss": t(1.0)}) == [1.0]
    assert kept({"loss_a": t(1.0), "loss_b": t(2.0)}) == [1.0, 2.0]
    assert kept((t(1.0), t(2.0))) == [1.0, 2.0]
    assert kept({"logits": t(2.0), "regression": t(3.0), "hidden_states": (t(4.0),), "cache_params": cache}) == [2.0, 3.0]
    assert kept({"last_hidden_state": t(1.0), "hidden_states": (t(2.0), t(3.0))}) == [1.0]
    assert kept({"hidden_states": (t(2.0), t(3.0))}) == [2.0, 3.0]
    assert kept({"loss": t(1.0), "logits": None, "x": torch.tensor(3)}) == [1.0]
    loop = [t(1.0)]
    loop.append(loop)
    assert kept(loop) == [1.0]
    for nothing in ("text", None, 3, torch.tensor(3), {"x": [torch.zeros(0)]}, nn.Linear(2, 2)):
        with pytest.raises(ArgumentError, match=r"forward: expected a tensor.*without floating-point tensor"):
            output_tensors(nothing)


def test_outputs_without_gradient_are_left_out():
    net = Net(lambda a, b: (a, b.detach(), torch.ones(3)))
    x = torch.randn(8, 64, 3)
    seen = collect(net, find_layers(net), [x])["lru"]
    net.output = lambda a, b: a
    assert torch.equal(seen.Q, collect(net, find_layers(net), [x])["lru"].Q)
