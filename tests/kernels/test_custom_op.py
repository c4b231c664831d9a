"""Custom ops in eager mode go straight to their kernel; whatever traces or transforms a program still meets one op."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernels.seen_ops import Seen
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from compressm.kernels import causal_conv1d, selective_scan, selective_state_update
from compressm.kernels.core.custom_op import CustomOp
from compressm.kernels.diagonal_scan.op import diagonal_scan
from compressm.kernels.fused_cpu.cross_entropy import cross_entropy_op
from compressm.kernels.fused_cpu.gates import gated_linear_op, gelu_dropout_op, glu_dropout_add_op
from compressm.kernels.fused_cpu.norms import norm_mean_op, norm_op
from compressm.kernels.fused_cpu.standardized_linear import standardized_linear_op
from compressm.kernels.lti_scan.op import Operands
from compressm.kernels.lti_scan.op import scan as lti

B, D, L, N = 2, 6, 40, 4


def scan(u, delta, A, mix_in, mix_out, skip, z, bias):
    return selective_scan(u, delta, A, mix_in, mix_out, skip, z, bias, delta_softplus=True, backend="cpp")


def lti_scan(u, log_decay, phase, w_in, w_out, D):
    return lti(u, Operands(log_decay, phase, w_in, w_out, D), None, "cpp", False)[0]


def norm(x, weight, bias):
    return norm_op(x, weight, bias, 1e-5, True)


def gelu(x):
    return gelu_dropout_op(x, torch.tensor(5), 0.3)


def glu(pre, residual):
    return glu_dropout_add_op(pre, residual, torch.tensor(5), 0.3)


def gated(x, weight, bias, residual):
    return gated_linear_op(x, weight, bias, residual, torch.tensor(5), 0.3)


def losses(scores):
    return cross_entropy_op(scores, torch.arange(L) % D, -100, "none")[0]


def norm_mean(x, weight, bias):
    return norm_mean_op(x, weight, bias, 1e-5, True)


def first(weight, bias):
    data = torch.arange(2.0 * B * L).view(B, L, 2)
    return standardized_linear_op(data, torch.tensor([40.0, 50.0]), torch.tensor([20.0, 30.0]), weight, bias)


conv = partial(causal_conv1d, activation="silu", backend="cpp")
diagonal = partial(diagonal_scan, backend="cpp")
CALLS = {
    "selective_scan": (scan, [(B, D, L), (B, D, L), (D, N), (B, N, L), (B, N, L), (D,), (B, D, L), (D,)]),
    "causal_conv1d": (conv, [(B, D, L), (D, 4), (D,)]),
    "lti_scan": (lti_scan, [(B, L, D), (N,), (N,), (2 * N, D), (D, 2 * N), (D,)]),
    "diagonal_scan": (diagonal, [(B, L, 2 * N), (N,), (N,)]),
    "norm": (norm, [(B, L, D), (D,), (D,)]),
    "gelu_dropout": (gelu, [(B, L, D)]),
    "glu_dropout_add": (glu, [(B, L, 2 * D), (B, L, D)]),
    "gated_linear": (gated, [(B, L, D), (2 * D, D), (2 * D,), (B, L, D)]),
    "cross_entropy": (losses, [(L, D)]),
    "norm_mean": (norm_mean, [(B, L, D), (D,), (D,)]),
    "standardized_linear": (first, [(D, 2), (D,)]),
}
# The argument that must not be positive.
DECAYS = {"selective_scan": 2, "lti_scan": 1, "diagonal_scan": 1}


@pytest.fixture(params=CALLS)
def call(request):
    """(name, function, leaf tensors) of an op."""
    function, shapes = CALLS[request.param]
    leaves = [torch.randn(shape) for shape in shapes]
    if request.param in DECAYS:
        leaves[DECAYS[request.param]] = -leaves[DECAYS[request.param]].abs()
    return request.param, function, [leaf.requires_grad_() for leaf in leaves]


def gradients(function, leaves) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*leaves).square().sum(), leaves)


def test_eager_mode_goes_straight_to_the_kernel(call):
    name, function, leaves = call
    with torch.profiler.profile() as recorded:
        out = function(*leaves)
        torch.autograd.grad(out.sum(), leaves)
        with torch.no_grad():
            function(*leaves)
    assert not [event.key for event in recorded.key_averages() if event.key.startswith("compressm::")]
    nodes, seen = [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    own = out.grad_fn.name()
    assert own == f"{name}Backward" or "Differentiable" in own
    assert [n for n in seen if n.name() == own] == [out.grad_fn]
    assert {n.name() for n in seen} <= {own, "torch::autograd::AccumulateGrad", "UnsqueezeBackward0"}


def test_the_gradient_is_that_of_the_op(call):
    name, function, leaves = call
    direct = gradients(function, leaves)
    with Seen() as seen:
        by_op = gradients(function, leaves)
    assert seen.ops == {name: 1, f"{name}_backward": 1}
    assert all(torch.equal(a, b) for a, b in zip(direct, by_op, strict=True))


def test_one_argument_at_a_time(call):
    _, function, leaves = call
    expected = gradients(function, leaves)
    for i, grad in enumerate(expected):
        some = [leaf.detach().requires_grad_(i == j) for j, leaf in enumerate(leaves)]
        (alone,) = torch.autograd.grad(function(*some).square().sum(), some[i])
        assert torch.equal(alone, grad)


def test_used_twice(call):
    _, function, leaves = call
    expected = gradients(function, leaves)
    both = torch.autograd.grad(function(*leaves).square().sum() + function(*leaves).square().sum(), leaves)
    for a, b in zip(both, expected, strict=True):
        torch.testing.assert_close(a, 2 * b)


def test_a_second_derivative_is_refused(call):
    _, function, leaves = call
    first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative. .*COMPRESSM_BACKEND=reference"):
        torch.autograd.grad(sum(grad.sum() for grad in first), leaves)


def test_compiles_into_one_node(call):
    name, function, leaves = call
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    out = torch.compile(function, fullgraph=True, backend=backend)(*leaves)
    assert torch.equal(out, function(*leaves))
    (graph,) = graphs
    targets = [str(node.target) for node in graph.graph.nodes if "compressm" in str(node.target)]
    assert targets == [f"compressm.{name}.default"]
    actual = gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), leaves)
    for a, b in zip(actual, gradients(function, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_autograd_takes_an_eager_graph(call):
    _, function, leaves = call
    expected = gradients(function, leaves)
    with compiled_autograd._enable(lambda graph: graph):
        function(*leaves).square().sum().backward()
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, expected, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_in_the_backward(call, reentrant):
    _, function, leaves = call
    expected = gradients(function, leaves)
    checkpoint(function, *leaves, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, expected, strict=True))


def test_hooks_on_saved_tensors(call):
    _, function, leaves = call
    expected, packed = gradients(function, leaves), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t.clone(), lambda t: t):
        out = function(*leaves)
    assert packed
    actual = torch.autograd.grad(out.square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_changed_argument_is_noticed(call):
    name, function, leaves = call
    kept = 1 if name == "diagonal_scan" else 0  # an argument that the backward reads
    changed = leaves[kept] * 1
    out = function(*leaves[:kept], changed, *leaves[kept + 1 :])
    changed.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), leaves)


def test_fake_tensors(call):
    _, function, leaves = call
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(leaf) for leaf in leaves]
        out = function(*fakes)
        grads = torch.autograd.grad(out.sum(), fakes)
    assert out.shape == function(*leaves).shape
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]


def test_traced_into_one_node(call):
    name, function, leaves = call
    graph = make_fx(function)(*(leaf.detach() for leaf in leaves))
    assert [str(n.target) for n in graph.graph.nodes if "compressm" in str(n.target)] == [f"compressm.{name}.default"]


def test_vectorized(call):
    _, function, leaves = call
    first = leaves[0].detach()
    rest = [leaf.detach() for leaf in leaves[1:]]
    both = torch.func.vmap(lambda u: function(u, *rest))(torch.stack([first, 2 * first]))
    assert torch.equal(both, torch.stack([function(first, *rest), function(2 * first, *rest)]))


def test_a_kernel_meets_no_wrapped_tensor():
    def double(x: Tensor) -> Tensor:
        return torch.from_numpy(2 * x.detach().numpy())  # a wrapped tensor has no memory

    op = CustomOp("compressm_tests::double", double)
    x = torch.randn(3, 2)
    assert torch.equal(torch.func.vmap(op)(x), 2 * x)


@pytest.mark.filterwarnings("ignore")
def test_torch_jit_traces_one_node():
    function, shapes = CALLS["causal_conv1d"]
    traced = torch.jit.trace(lambda x, w, b: function(x, w, b), tuple(torch.randn(shape) for shape in shapes))
    assert [node.kind() for node in traced.graph.nodes() if "compressm" in node.kind()] == ["compressm::causal_conv1d"]


def test_under_autocast_and_in_inference_mode(call):
    _, function, leaves = call
    expected, expected_gradients = function(*leaves), gradients(function, leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(function(*leaves), expected)
        assert all(torch.equal(a, b) for a, b in zip(gradients(function, leaves), expected_gradients, strict=True))
    with torch.inference_mode():
        assert torch.equal(function(*leaves), expected)


@pytest.fixture
def decode():
    """(state, a function of it that decodes one token with everything float32)."""
    x, dt, z = torch.randn(3, B, D).unbind(0)
    A, mix_in, mix_out = -torch.rand(D, N), *torch.randn(2, B, N).unbind(0)
    return torch.randn(B, D, N), lambda state: selective_state_update(state, x, dt, A, mix_in, mix_out, z=z, backend="cpp")


def test_a_writing_op_goes_straight_to_its_kernel_and_is_noticed(decode):
    state, call = decode
    factor = torch.randn(B, D, N, requires_grad=True)
    saved = (factor * state).sum()
    with torch.profiler.profile() as recorded:
        call(state)
    assert not [event.key for event in recorded.key_averages() if event.key.startswith("compressm::")]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_a_writing_op_is_one_op_where_it_is_seen(decode):
    state, call = decode
    copies = [state.clone() for _ in range(4)]
    expected = call(copies[0])
    with Seen() as seen:
        assert torch.equal(call(copies[1]), expected)
    assert seen.ops == {"selective_state_update": 1}
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(copies[2]), expected)
    with torch.inference_mode():
        copies[3] = state.clone()  # an inference tensor
        assert torch.equal(call(copies[3]), expected)
    assert not torch.equal(copies[0], state)
    for copy in copies[1:]:
        assert torch.equal(copy, copies[0])
