"""Whatever stands in the place of a sub-module, wraps it or hangs on it acts: in forward, step by step and in calibration."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from compressm import FixedRank, compress
from compressm.adapters import find_layers
from compressm.layers import LRUBlock, Mamba
from compressm.layers.mamba_mixer import scan_inputs

PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")


class LoRA(nn.Module):
    """An adapter library's linear layer: the base and a product of two narrow matrices."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.A, self.B = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.B(self.A(x))


class LoRAConv(nn.Module):
    """The same around the causal convolution: a second convolution beside it."""

    def __init__(self, base: nn.Conv1d) -> None:
        super().__init__()
        self.base_layer, self.beside = base, copy.deepcopy(base)
        nn.init.normal_(self.beside.weight)
        nn.init.zeros_(self.beside.bias)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.beside(x)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def with_lora(layer: nn.Module, name: str) -> nn.Module:
    """The same numbers without the adapter."""
    merged = copy.deepcopy(layer)
    if name == "conv1d":
        layer.conv1d = LoRAConv(layer.conv1d)
        merged.conv1d.weight.data += layer.conv1d.beside.weight.data
    else:
        adapter = LoRA(getattr(layer, name))
        setattr(layer, name, adapter)
        getattr(merged, name).weight.data += adapter.B.weight.data @ adapter.A.weight.data
    return merged


def with_parametrization(layer: nn.Module, name: str) -> nn.Module:
    merged = copy.deepcopy(layer)
    getattr(merged, name).weight.data *= 2
    parametrize.register_parametrization(getattr(layer, name), "weight", Doubled())
    return merged


def with_pruning(layer: nn.Module, name: str) -> nn.Module:
    merged = copy.deepcopy(layer)
    torch.manual_seed(1)
    module = getattr(layer, name)
    prune.random_unstructured(module, "weight", 0.5)
    getattr(merged, name).weight.data *= module.weight_mask
    with torch.no_grad():
        module.weight.zero_()  # what a forward pass computes anew from the mask
    return merged


def with_weight_norm(layer: nn.Module, name: str) -> nn.Module:
    merged = copy.deepcopy(layer)
    weight_norm(getattr(layer, name))
    with torch.no_grad():
        getattr(layer, name).weight_g.mul_(1.5)
    getattr(merged, name).weight.data *= 1.5
    return merged


def with_output_hook(layer: nn.Module, name: str) -> nn.Module:
    merged = copy.deepcopy(layer)
    getattr(layer, name).register_forward_hook(lambda module, args, out: 1.25 * out)
    for parameter in getattr(merged, name).parameters():
        parameter.data *= 1.25
    return merged


def with_own_forward(layer: nn.Module, name: str) -> nn.Module:
    merged = copy.deepcopy(layer)
    module = getattr(layer, name)
    module.forward = lambda x, plain=module.forward: 1.25 * plain(x)
    for parameter in getattr(merged, name).parameters():
        parameter.data *= 1.25
    return merged


CHANGES = {
    "adapter": with_lora, "parametrization": with_parametrization, "pruning": with_pruning, "weight norm": with_weight_norm,
    "hook": with_output_hook, "own forward": with_own_forward,
}  # fmt: skip


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def mamba() -> Mamba:
    torch.manual_seed(0)
    layer = Mamba(16, d_state=4)
    with torch.no_grad():
        layer.dt_proj.bias.add_(2.0)
    return layer


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("name", [*PROJECTIONS, "conv1d"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_mamba_layer_calls_its_sub_modules(change, name):
    layer = mamba()
    plain, merged = copy.deepcopy(layer), CHANGES[change](layer, name)
    x = torch.randn(2, 17, 16)
    expected = merged.double()(x.double())
    assert error(plain(x), expected) > 1e-4
    assert error(layer(x), expected) < 1e-5
    conv, state = layer.allocate_inference_cache(2)
    with torch.no_grad():
        steps = torch.cat([layer.step(x[:, t : t + 1], conv, state)[0] for t in range(17)], 1)
    assert error(steps, expected) < 1e-5
    inputs, selection = scan_inputs(layer, x)
    right, wanted = scan_inputs(merged, x.double())
    assert error(inputs, right) < 1e-5
    steps = [s.dt + (0 if s.dt_bias is None else s.dt_bias) for s in (selection, wanted)]
    assert error(*steps) < 1e-5


@pytest.mark.parametrize("name", [*PROJECTIONS, "conv1d"])
def test_an_adapter_learns(name):
    layer = mamba()
    with_lora(layer, name)
    layer(torch.randn(2, 17, 16)).square().sum().backward()
    trained = [p for n, p in layer.named_parameters() if p.requires_grad and (".A." in n or ".B." in n or "beside" in n)]
    assert trained
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


@pytest.mark.parametrize("name", ["in_proj", "dt_proj", "out_proj"])
def test_a_reduction_measures_with_the_adapter(name):
    layer, x = mamba(), torch.randn(4, 33, 16)
    merged = with_lora(layer, name)
    reports = [compress(nn.Sequential(m), FixedRank(2), calibration=[x]) for m in (layer, merged)]
    for actual, expected in zip(*(report.layers[0].spectrum for report in reports), strict=True):
        assert actual == pytest.approx(expected, rel=1e-4)
    assert error(layer(x), merged(x)) < 1e-5


def test_packed_sequences_with_another_convolution():
    layer = mamba()
    with_lora(layer, "conv1d")
    x, bounds = torch.randn(1, 12, 16), torch.tensor([0, 3, 4, 10, 12])
    alone = torch.cat([layer(part) for part in x.split([3, 1, 6, 2], 1)], 1)
    assert error(layer(x, cu_seqlens=bounds), alone) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [lambda: Mamba(16), lambda: LRUBlock(16, 8)])
def test_quantised_projections(make):
    model, x = nn.Sequential(make()).eval(), torch.randn(2, 9, 16)
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert 0 < error(small(x), model(x)) < 0.05


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_an_lru_block_calls_its_sub_modules(dropout):
    torch.manual_seed(0)
    block, x = LRUBlock(16, 8, dropout=dropout).eval(), torch.randn(2, 17, 16)
    merged = with_lora(block, "glu")
    assert error(block(x), merged.double()(x.double())) < 1e-5
    called = []
    for name, module in block.named_children():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    block(x)
    assert called == ["norm", "lru", "dropout", "glu", "dropout"]


def test_spectral_norm_acts():
    layer, x = mamba(), torch.randn(2, 9, 16)
    plain = copy.deepcopy(layer)
    parametrizations.spectral_norm(layer.in_proj)
    layer.eval()
    plain.in_proj.weight.data = layer.in_proj.weight.detach()
    assert error(layer(x), plain(x)) < 1e-5


def test_a_mixer_of_transformers():
    transformers = pytest.importorskip("transformers")
    from compressm.integrations.transformers import accelerate_

    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=11, hidden_size=16, state_size=4, num_hidden_layers=1)
    model = transformers.MambaForCausalLM(config).eval()
    mixer, ids = model.backbone.layers[0].mixer, torch.randint(11, (2, 9))
    for name in PROJECTIONS:
        merged = with_lora(mixer, name)
        expected = copy.deepcopy(model)
        expected.backbone.layers[0].mixer = merged
        accelerate_(model)
        with torch.no_grad():
            assert error(model(ids).logits, expected(ids).logits) < 1e-5, name
        accelerate_(model, mode=False)
        setattr(mixer, name, getattr(merged, name))
    assert find_layers(model)
