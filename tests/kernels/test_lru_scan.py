"""The scan of an LRU's parameters: values and gradients against the definition in float64, half precision, bad input."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernels.seen_ops import Seen
from torch.utils.checkpoint import checkpoint

from compressm.errors import ArgumentError, BackendError
from compressm.kernels.fused_cpu import lru_scan
from compressm.kernels.fused_cpu.lru_scan import scan_in_one_op
from compressm.kernels.lti_scan.op import planar

NAMES = ["x", "nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im", "D"]
SHAPES = [(1, 1, 1, 1, 1), (2, 9, 3, 4, 3), (2, 40, 2, 5, 7), (3, 0, 2, 3, 2), (1, 6, 33, 300, 33)]  # batch, L, H, N, H_out


def random_inputs(batch, length, channels, states, outputs):
    """Float64 arguments by name, moduli in [0.7, 0.99], D only where it fits."""
    draw = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    modulus = 0.7 + 0.29 * torch.rand(states, generator=draw, dtype=torch.float64)
    values = [
        normal(batch, length, channels), (-modulus.log()).log(), normal(states), 0.3 * normal(states),
        normal(states, channels), normal(states, channels), normal(outputs, states), normal(outputs, states),
        normal(channels) if channels == outputs else None,
    ]  # fmt: skip
    return dict(zip(NAMES, values, strict=True)), torch.complex(normal(batch, states), normal(batch, states))


def definition(x, nu_log, theta_log, gamma_log, B_re, B_im, C_re, C_im, D, *, initial_state):
    lam = torch.exp(torch.complex(-nu_log.exp(), theta_log.exp()))
    B, C, h, y = gamma_log.exp()[:, None] * torch.complex(B_re, B_im), torch.complex(C_re, C_im), initial_state, []
    for u in x.unbind(1):
        h = lam * h + u.to(B.dtype) @ B.T
        y.append((h @ C.T).real + (0 if D is None else D * u))
    return torch.stack(y, 1) if y else x.new_zeros((x.shape[0], 0, C.shape[0])), h


def evaluate(run, inputs, state, dtype):
    """Output, last state and the gradients of a random linear functional of both."""
    leaves = {name: None if t is None else t.to(dtype).requires_grad_() for name, t in inputs.items()}
    start = state.to(dtype.to_complex()).requires_grad_()
    y, last = run(**leaves, initial_state=start)
    draw = torch.Generator().manual_seed(7)
    weights = [torch.randn(t.shape, generator=draw, dtype=torch.float64) for t in (y, last.real)]
    loss = (y * weights[0].to(dtype)).sum() + (last.real * weights[1].to(dtype)).sum() + last.imag.square().sum()
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None} | {"initial_state": start}
    grads = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)  # without steps some are not used
    return {"y": y.detach(), "last": last.detach(), **dict(zip(wanted, grads, strict=True))}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), ("cpp", torch.float32), (None, torch.float32)])
@pytest.mark.usefixtures("poisoned_memory")
def test_it_is_the_definition(assert_close, shape, backend, dtype):
    inputs, state = random_inputs(*shape)

    def run(**arguments):
        return lru_scan(**arguments, return_last_state=True, backend=backend)

    oracle, results = (evaluate(f, inputs, state, t) for f, t in ((definition, torch.float64), (run, dtype)))
    for name, expected in oracle.items():
        assert_close(results[name].to(expected.dtype), expected, name, dtype)


@pytest.mark.parametrize("length", [0, 1, 4, 7, 24])
@pytest.mark.parametrize(("tau", "rows", "store"), [(1, 5, True), (2, 3, False), (4, 2, True), (5, 64, False)])
@pytest.mark.usefixtures("poisoned_memory")
def test_heads_and_tables(assert_close, length, tau, rows, store):
    for outputs in (3, 2):
        inputs, state = random_inputs(2, length, 3, 4, outputs)

        def run(x, *parameters, D, initial_state):
            y, last = scan_in_one_op(x, parameters, D, planar(initial_state, x, parameters[0]), tau, rows, store)
            return y, torch.complex(*last.chunk(2, -1))

        def call(run, x, nu_log, theta_log, gamma_log, B_re, B_im, C_re, C_im, D, *, initial_state):
            return run(x, nu_log, theta_log, gamma_log, B_re, B_im, C_re, C_im, D=D, initial_state=initial_state)

        oracle = evaluate(partial(call, definition), inputs, state, torch.float64)
        results = evaluate(partial(call, run), inputs, state, torch.float32)
        for name, expected in oracle.items():
            assert_close(results[name].to(expected.dtype), expected, name, torch.float32)


def test_the_parts_are_seen_where_something_looks(leaves):
    y = lru_scan(*leaves)
    assert "Differentiable" in y.grad_fn.name()
    assert {node.name() for node, _ in y.grad_fn.next_functions if node} == {"torch::autograd::AccumulateGrad"}
    with Seen() as seen:
        torch.testing.assert_close(lru_scan(*leaves), y)
    assert seen.ops == {"lti_scan": 1}


def test_any_strides():
    inputs, _ = random_inputs(2, 9, 5, 6, 4)
    dense = [inputs[name].float() for name in NAMES[:8]]
    strided = [torch.stack([t, t], -1)[..., 0].requires_grad_() for t in dense]
    dense = [t.requires_grad_() for t in dense]
    ys = [lru_scan(*tensors) for tensors in (dense, strided)]
    assert torch.equal(*ys)
    grads = [torch.autograd.grad(y.square().sum(), tensors) for y, tensors in zip(ys, (dense, strided), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.fixture
def leaves():
    inputs, _ = random_inputs(2, 21, 3, 4, 3)
    return [t.float().requires_grad_() for t in inputs.values()]


def gradients(leaves, run=lru_scan):
    return torch.autograd.grad(run(*leaves).square().sum(), leaves)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_in_the_backward(leaves, reentrant):
    expected = gradients(leaves)
    checkpoint(lru_scan, *leaves, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, expected, strict=True))


def test_hooks_meet_all_that_is_kept(leaves):
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t.clone(), lambda t: t):
        y = lru_scan(*leaves)
    assert len(packed) == 3 + 4 + 1  # x, gamma_log and D; the operands; the states
    actual = torch.autograd.grad(y.square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(actual, gradients(leaves), strict=True))


def test_what_is_kept_is_let_go_after_the_backward(leaves):
    y = lru_scan(*leaves)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


def test_a_changed_input_is_noticed(leaves):
    x = leaves[0] * 1
    y = lru_scan(x, *leaves[1:])
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_refused(leaves):
    y = lru_scan(*leaves)
    first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(sum(grad.sum() for grad in first), leaves)


def test_autocast_does_not_round_it(leaves):
    expected = lru_scan(*leaves), gradients(leaves)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lru_scan(*leaves), expected[0])
        assert all(torch.equal(a, b) for a, b in zip(gradients(leaves), expected[1], strict=True))


@pytest.mark.slow
def test_compiles_into_one_graph(leaves):
    compiled = torch.compile(lru_scan, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(leaves, compiled), gradients(leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_vectorized(leaves):
    x, *rest = (leaf.detach() for leaf in leaves)
    both = torch.func.vmap(lambda u: lru_scan(u, *rest))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(both, torch.stack([lru_scan(x, *rest), lru_scan(2 * x, *rest)]))


def test_half_precision_parameters_are_used_in_float32(assert_close):
    inputs, state = random_inputs(2, 30, 4, 6, 4)
    halves = {name: t.bfloat16() for name, t in inputs.items()}
    y, last = lru_scan(**halves, initial_state=state.cfloat(), return_last_state=True)
    assert y.dtype == torch.bfloat16
    assert last.dtype == torch.cfloat
    exact, _ = lru_scan(**{name: t.double() for name, t in halves.items()}, initial_state=state, return_last_state=True)
    assert_close(y.double(), exact, "y", torch.bfloat16)


def test_frozen_parameters_get_no_gradient():
    inputs, _ = random_inputs(1, 8, 3, 4, 3)
    leaves = {name: t.float().requires_grad_(name in ("x", "C_im")) for name, t in inputs.items()}
    lru_scan(**leaves).sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == {"x", "C_im"}


@pytest.mark.parametrize("name", [*NAMES, "initial_state"])
def test_wrong_arguments_are_named(name):
    inputs, state = random_inputs(2, 5, 3, 4, 3)
    arguments = {**inputs, "initial_state": state}
    lru_scan(**arguments)
    spoken = {"B_re": "B", "B_im": "Im B", "C_re": "C", "C_im": "Im C"}.get(name, name)
    wrong = [arguments[name][..., :2], arguments[name].long() if name != "initial_state" else state.real]
    if name in ("x", "nu_log"):
        wrong[0] = arguments[name][None]
    for tensor in wrong:
        with pytest.raises(ArgumentError, match=f"^{spoken}:"):
            lru_scan(**{**arguments, name: tensor})


def test_a_backend_that_cannot_run_says_why():
    inputs, _ = random_inputs(1, 3, 2, 2, 2)
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        lru_scan(**inputs, backend="cpp")
