"""Traced once, an op serves every batch size and length: torch.compile, torch.export and make_fx with symbolic sizes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

from compressm import kernels as K
from compressm.kernels import fused_cpu
from compressm.layers import LRU, GatedDeltaNet, LayerNorm, LRUBlock, Mamba, Mamba2, RMSNorm

H, N = 8, 4
SHAPES = [(6, 11), (3, 14), (3, 9), (7, 33), (2, 257), (5, 2)]  # batch, length: unlike other sizes


class Op(nn.Module):
    """A module around a function of the input and of parameters."""

    def __init__(self, function, *parameters):
        super().__init__()
        self.function, self.weights = function, nn.ParameterList(parameters)

    def forward(self, x):
        return self.function(x, *self.weights)


def scan(x, A, mix, dtype=None, **options):
    x = x if dtype is None else x.to(dtype)
    steps = (x @ mix).mT
    return K.selective_scan(x.mT, x.mT.abs(), A, steps, steps, z=x.mT, delta_softplus=True, **options).mT


def heads(x, A, mix, **options):
    steps, x = (x @ mix).unsqueeze(2), x.unflatten(-1, (2, H // 2))
    return K.ssd(x, x[..., 0], A, steps, steps, z=x, dt_softplus=True, **options).flatten(2)


def delta(x, mix, channelwise=False):
    keys, values = (x @ mix).unsqueeze(2), x.unflatten(-1, (2, H // 2))
    g = keys.abs().expand(-1, -1, 2, -1) if channelwise else values[..., 0].abs()
    return K.gated_delta_rule(keys, keys, values, -g, values[..., 1].sigmoid(), use_qk_l2norm_in_kernel=True)[0].flatten(2)


def attention(x, mix, of_channels, **options):
    q, v = (x @ mix).unsqueeze(2), x.unflatten(-1, (2, H // 2))
    g = -x.abs().unflatten(-1, (2, N)) if of_channels else -x[..., :2].abs()
    return K.linear_attention(q, q, v, g, **options)[0].flatten(2)


def lti(x, decay, phase, B, C, **options):
    eigenvalues = torch.complex(-decay.exp(), phase)
    return K.lti_scan(x, eigenvalues, torch.complex(B, B), torch.complex(C, C), **options)


def losses(x, weight):
    return fused_cpu.cross_entropy(x @ weight, torch.ones_like(x[..., 0]).long())


def decay():
    return -torch.rand(H, N) - 0.1


MODULES = {
    "LRU": lambda: LRU(H, N),
    "LRU, few states": lambda: LRU(2, 64, max_phase=0.3),
    "LRU in float64": lambda: LRU(H, N, dtype=torch.float64),
    "LRUBlock": lambda: LRUBlock(H, N),
    "LRUBlock with dropout": lambda: LRUBlock(H, N, dropout=0.0),
    "Mamba": lambda: Mamba(H, N),
    "Mamba in float64": lambda: Mamba(H, N, dtype=torch.float64).double(),
    "Mamba2": lambda: Mamba2(H, N, headdim=H),
    "Mamba2 with maps": lambda: Mamba2(H, N, headdim=H, d_features=N + 2),
    "GatedDeltaNet": lambda: GatedDeltaNet(H, head_dim=N, num_heads=2, expand_v=2),
    "GatedDeltaNet with maps": lambda: GatedDeltaNet(H, head_dim=N, num_heads=2, expand_v=2, d_state=3),
    "LayerNorm": lambda: LayerNorm(H),
    "RMSNorm": lambda: RMSNorm(H),
    "selective_scan": lambda: Op(scan, decay(), torch.randn(H, N)),
    "selective_scan, constant B and C": lambda: Op(
        lambda x, A, B: K.selective_scan(x.mT, x.mT.abs(), A, B, B).mT, decay(), torch.randn(H, N)
    ),
    "selective_scan, reference": lambda: Op(partial(scan, backend="reference"), decay(), torch.randn(H, N)),
    "ssd": lambda: Op(heads, -torch.rand(2) - 0.1, torch.randn(H, N)),
    "ssd, reference": lambda: Op(partial(heads, backend="reference"), -torch.rand(2) - 0.1, torch.randn(H, N)),
    "gated_delta_rule": lambda: Op(delta, torch.randn(H, N)),
    "gated_delta_rule, decays of channels": lambda: Op(partial(delta, channelwise=True), torch.randn(H, N)),
    "linear_attention": lambda: Op(partial(attention, of_channels=True), torch.randn(H, N)),
    "linear_attention of heads": lambda: Op(partial(attention, of_channels=False), torch.randn(H, N)),
    "linear_attention, reference": lambda: Op(partial(attention, of_channels=True, backend="reference"), torch.randn(H, N)),
    "lti_scan": lambda: Op(lti, torch.randn(N), torch.randn(N), torch.randn(N, H), torch.randn(H, N)),
    "lti_scan, reference": lambda: Op(
        partial(lti, backend="reference"), torch.randn(N), torch.randn(N), torch.randn(N, H), torch.randn(H, N)
    ),
    "diagonal_scan": lambda: Op(lambda x, d, p: K.diagonal_scan(x, -d.abs(), p), torch.randn(H // 2), torch.randn(H // 2)),
    "causal_conv1d": lambda: Op(lambda x, w: K.causal_conv1d(x.mT, w, activation="silu").mT, torch.randn(H, 4)),
    "causal_conv1d of steps": lambda: Op(
        lambda x, w: K.causal_conv1d(x.mT.contiguous(), w, activation="silu").mT, torch.randn(H, 4)
    ),
    "layer_norm_mean": lambda: Op(lambda x, w: fused_cpu.layer_norm_mean(x, w), torch.randn(H)),
    "gelu_dropout": lambda: Op(lambda x: fused_cpu.gelu_dropout(x, 0.0)),
    "glu_dropout_add": lambda: Op(lambda x: fused_cpu.glu_dropout_add(torch.cat([x, x], -1), x, 0.0)),
    "linear_glu_dropout_add": lambda: Op(
        lambda x, w: fused_cpu.linear_glu_dropout_add(x, w, None, x, 0.0), torch.randn(2 * H, H)
    ),
    "standardized_linear": lambda: Op(
        lambda x, w: x + fused_cpu.standardized_linear(torch.ones_like(x)[..., :2], w.new_zeros(2), w.new_ones(2), w),
        torch.randn(H, 2),
    ),
    "cross_entropy": lambda: Op(losses, torch.randn(H, 5)),
}


@pytest.fixture(params=MODULES)
def module(request):
    torch.manual_seed(0)
    return MODULES[request.param]()


def inputs(module: nn.Module, shapes=SHAPES) -> list[torch.Tensor]:
    width = module.d_model if isinstance(module, LRU) else H
    dtype = next(module.parameters(), torch.empty(0)).dtype
    return [torch.randn(*shape, width, dtype=dtype) for shape in shapes]


def results(function, module, x):
    """Output and gradients, of the input first."""
    x = x.clone().requires_grad_()
    y = function(x)
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), [x, *module.parameters()], allow_unused=True)]


def check(function, module, x):
    for actual, expected in zip(results(function, module, x), results(module, module, x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dynamic", [None, True])
def test_six_shapes_take_at_most_two_graphs(module, dynamic):
    torch._dynamo.reset()
    counter = CompileCounter()
    seen = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=counter)
    for x in inputs(module):
        check(seen, module, x)
    assert counter.frame_count <= 2


def test_gradients_of_a_compiled_graph(module):
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for x in inputs(module, SHAPES[:4]):
        check(compiled, module, x)


def test_symbolic_sizes_in_make_fx(module):
    first, *others = inputs(module)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def call(x, parameters):
        return torch.func.functional_call(module, parameters, (x,))

    graph = make_fx(call, tracing_mode="symbolic")(first, parameters)
    for x in others:
        torch.testing.assert_close(graph(x, parameters), module(x), rtol=2e-5, atol=2e-5)


def test_exported_with_free_batch_and_length(module):
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=4096)
    first, *others = inputs(module)
    program = torch.export.export(nn.Sequential(module).eval(), (first,), dynamic_shapes=({0: batch, 1: length},))
    assert len([node for node in program.graph.nodes if "compressm" in str(node.target)]) <= 8
    for x in [*others, *inputs(module, [(1, 5)])]:
        torch.testing.assert_close(program.module()(x), module(x), rtol=2e-5, atol=2e-5)


def decode_of_heads(state, x, dt, mix, rows):
    A = -torch.ones(4, 8, 16)
    return K.selective_state_update(state, x, dt, A, mix, mix, state_batch_indices=rows)


STEPS = {  # a function of a batch size to a call's arguments, and the call
    "Mamba.step": (
        lambda b: (torch.randn(b, 1, H), torch.randn(b, 2 * H, 4), torch.randn(b, 2 * H, N)), Mamba(H, N).eval().step
    ),
    "LRU.step": (lambda b: (torch.randn(b, H), torch.randn(b, N, dtype=torch.cfloat)), LRU(H, N).step),
    "LRU behind a state": (
        lambda b: (torch.randn(b, b + 4, H), torch.randn(b, N, dtype=torch.cfloat)), partial(LRU(H, N), return_last_state=True)
    ),
    "packed Mamba": (
        lambda b: (torch.randn(1, 4 * b, H), torch.tensor([0, 2, 4 * b - 1, 4 * b])),
        lambda x, bounds, layer=Mamba(H, N): layer(x, cu_seqlens=bounds),  # noqa: B008
    ),
    "selective_state_update": (
        lambda b: (
            torch.randn(9, 4, 8, 16), torch.randn(b, 4, 8), torch.rand(b, 4, 8), torch.randn(b, 2, 16), torch.arange(b).int()
        ),
        decode_of_heads,
    ),
    "gated_delta_rule_update": (
        lambda b: (
            torch.randn(9, 4, 8, 16), torch.randn(b, 2, 8), torch.randn(b, 4, 16), torch.rand(b, 4), torch.arange(b).int()
        ),
        lambda state, q, v, beta, rows: K.gated_delta_rule_update(state, q, q, v, -beta, beta, state_batch_indices=rows),
    ),
    "causal_conv1d_update": (
        lambda b: (torch.randn(b, H), torch.randn(b, H, 3), torch.randn(H, 4)),
        partial(K.causal_conv1d_update, activation="silu"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_streaming_and_packing_take_at_most_two_graphs(name):
    arguments, call = STEPS[name]
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for batch in (3, 5, 2, 7, 4, 6):
        given = arguments(batch)
        copies = [t.clone() for t in given]
        with torch.no_grad():
            expected, actual = call(*given), compiled(*copies)
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(copies, list(given), rtol=2e-5, atol=2e-5)  # what is advanced in place
    assert counter.frame_count <= 2


@pytest.mark.parametrize("make", [lambda: LRU(H, N), lambda: Mamba(H, N), lambda: LRUBlock(H, N)])
def test_a_memory_estimate_runs_nothing(make):
    with torch._subclasses.fake_tensor.FakeTensorMode():
        layer = make()
        y = layer(torch.empty(2, 9, H))
        y.sum().backward()
        assert y.shape == (2, 9, H)
        assert all(p.grad.shape == p.shape for p in layer.parameters())
    with torch.device("meta"):
        layer = make()
    y = layer(torch.empty(3, 5, H, device="meta"))
    y.sum().backward()
    assert y.is_meta
    assert y.shape == (3, 5, H)
    assert all(p.grad.shape == p.shape for p in layer.parameters())
