"""Models that recompute parts of themselves in the backward pass, or were compiled, are measured like others."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import compressm
from compressm.adapters import find_layers
from compressm.compression import CalibrationWarning
from compressm.compression.planning.calibration import collect
from compressm.layers import LRU, Mamba


def plainly(function, x):
    return function(x)


def nested(function, x):
    return checkpoint(lambda x: checkpoint(function, x, use_reentrant=True) + 0, x, use_reentrant=True)


def in_sequence(function, x):
    return checkpoint_sequential([function, nn.Identity(), nn.Identity()], 2, x, use_reentrant=True)


WAYS = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "non-reentrant": partial(checkpoint, use_reentrant=False),
    "nested": nested,
    "sequential": in_sequence,
}


class Net(nn.Module):
    """Layers with random numbers between them, so that a recomputation must draw them again."""

    def __init__(self, run, embed=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(3, 8) if embed else nn.Identity()
        size = 8 if embed else 3
        self.layers = nn.ModuleList([LRU(size, 16), Mamba(size, d_state=8), LRU(size, 12)])
        self.head, self.run = nn.Linear(size, 1), run

    def block(self, layer, x):
        return x + torch.tanh(layer(x)) * torch.rand(x.shape[-1])

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = self.run(partial(self.block, layer), x)
        return self.head(x)


def batches(count=2):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 33, 3, generator=generator) for _ in range(count)]


def moments(net):
    torch.manual_seed(3)
    return collect(net, find_layers(net), batches())


@pytest.mark.parametrize("embed", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_checkpointed_layers_are_measured_like_others(way, embed):
    """Also where the checkpoint's input needs no gradient."""
    expected, found = moments(Net(plainly, embed)), moments(Net(WAYS[way], embed))
    for name, value in expected.items():
        for letter in ("P", "Q"):
            assert torch.equal(getattr(found[name], letter), getattr(value, letter)), (name, letter)
    for name in ("layers.0", "layers.2"):
        assert (found[name].rows, found[name].sequences) == (expected[name].rows, expected[name].sequences)
    assert found["layers.1"].M.shape == expected["layers.1"].M.shape


def test_checkpoint_wrappers_are_measured_like_others():
    nets = [Net(plainly), Net(plainly)]
    nets[1].layers[0] = checkpoint_wrapper(nets[1].layers[0], CheckpointImpl.REENTRANT)
    expected, found = (moments(net) for net in nets)
    assert torch.equal(found["layers.0._checkpoint_wrapped_module"].Q, expected["layers.0"].Q)


def test_training_is_checkpointed_as_before_afterwards():
    net, before = Net(WAYS["reentrant"]), checkpointing.CheckpointFunction
    with pytest.raises(ZeroDivisionError):
        collect(net, find_layers(net), batches(), forward=lambda model, x: model(x) / (1 // 0))
    assert checkpointing.CheckpointFunction is before
    moments(net)
    assert checkpointing.CheckpointFunction is before
    seen = []
    net.layers[0].register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    net(batches()[0]).sum().backward()
    assert seen == [False, True]


class Detached(torch.autograd.Function):
    """A checkpoint of another library that lost the gradient."""

    @staticmethod
    def forward(ctx, x, function):
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def cut(function, x):
    return Detached.apply(x, function)


def frozen(function, x):
    with torch.no_grad():
        return function(x)


@pytest.mark.parametrize("run", [cut, frozen, lambda function, x: function(x).detach().requires_grad_()])
def test_a_layer_that_no_gradient_reaches_is_named(run):
    net = Net(plainly)
    blocks = iter([run, plainly, plainly] * 4)
    net.run = lambda function, x: next(blocks)(function, x)
    with pytest.warns(CalibrationWarning, match=r"reached layer\(s\) 'layers\.0', so"):
        found = moments(net)
    assert found["layers.0"].Q is None
    assert found["layers.2"].Q is not None


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield partial(torch.compile, backend="eager")
    torch._dynamo.reset()


COMPILED = {
    "the model's forward": lambda net, compiler: setattr(net, "forward", compiler(net.forward)),
    "a layer's forward": lambda net, compiler: setattr(net.layers[0], "forward", compiler(net.layers[0].forward)),
    "a method": lambda net, compiler: setattr(net, "block", compiler(net.block)),
    "a layer": lambda net, compiler: net.layers[0].compile(backend="eager"),
    "the model in place": lambda net, compiler: net.compile(backend="eager"),
    "a wrapped layer": lambda net, compiler: net.layers.__setitem__(0, compiler(net.layers[0])),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own look at the layers' inputs
@pytest.mark.parametrize("what", COMPILED)
def test_code_that_was_compiled_before_is_measured(what, compiler):
    expected = moments(Net(plainly))
    net = Net(plainly)
    COMPILED[what](net, compiler)
    compiled = {key: value for key, value in vars(net).items() if key == "forward"}
    net(batches()[0]).sum().backward()
    found = moments(net)
    for (name, value), seen in zip(expected.items(), found.values(), strict=True):
        assert torch.equal(seen.P, value.P), name
        assert torch.equal(seen.Q, value.Q), name
    assert {key: value for key, value in vars(net).items() if key == "forward"} == compiled
    report = compressm.compress(net, compressm.FixedRank(4), calibration=batches())
    assert {layer.gramians for layer in report.layers} == {"data"}
    net(batches()[0]).sum().backward()


def test_compiled_code_runs_compiled_again_afterwards(compiler):
    counter = torch._dynamo.testing.CompileCounter()
    net = Net(plainly)
    net.embed.forward = torch.compile(net.embed.forward, backend=counter)
    net(batches()[0])
    compressm.inspect(net, batches())
    assert counter.frame_count == 1
    net.eval()(batches()[0])
    assert torch._dynamo.eval_frame._stance.stance == "default"
