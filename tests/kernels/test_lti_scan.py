"""LTI scan: every backend and form against the float64 definition, outputs and all gradients."""

from __future__ import annotations

import pytest
import torch
from global_state import threads
from hypothesis import given, settings
from hypothesis import strategies as st

from compressm.errors import ArgumentError, BackendError
from compressm.kernels import diagonal_scan, lti_scan, lti_scan_planar, plan
from compressm.kernels.core import cpp
from compressm.kernels.diagonal_scan import reference as reference
from compressm.kernels.lti_scan.block import block_tables, toeplitz
from compressm.kernels.lti_scan.op import Operands, _run, lti_scan_backward_op

NAMES = ["u", "log_decay", "phase", "B_re", "B_im", "C_re", "C_im", "D", "initial_state"]


def random_inputs(batch, length, channels, states, outputs=None, seed=0):
    """Float64 arguments of lti_scan_planar: moduli in [0.7, 0.99], D only where it fits."""
    draw = torch.Generator().manual_seed(seed)
    outputs = outputs or channels

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    modulus = 0.7 + 0.29 * torch.rand(states, generator=draw, dtype=torch.float64)
    phase = 6.28 * torch.rand(states, generator=draw, dtype=torch.float64)
    D = normal(channels) if outputs == channels else None
    matrices = [normal(states, channels), normal(states, channels), normal(outputs, states), normal(outputs, states)]
    return [normal(batch, length, channels), modulus.log(), phase, *matrices, D, normal(batch, 2 * states)]


def evaluate(run, inputs, dtype):
    """Outputs and gradients of a random linear functional of (y, last state)."""
    leaves = [None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in inputs]
    y, last = run(leaves)
    draw = torch.Generator().manual_seed(7)
    weights = [torch.randn(t.shape, generator=draw, dtype=torch.float64) for t in (y, last)]
    loss = (y * weights[0].to(y.dtype)).sum() + (last * weights[1].to(last.dtype)).sum()
    wanted = [t for t in leaves if t is not None]
    names = [name for name, t in zip(NAMES, leaves, strict=True) if t is not None]
    grads = torch.autograd.grad(loss, wanted, materialize_grads=y.numel() * last.numel() == 0)
    return {"y": y.detach(), "last": last.detach(), **dict(zip(names, grads, strict=True))}


def public(backend=None):
    return lambda t: lti_scan_planar(*t[:8], initial_state=t[8], return_last_state=True, backend=backend)


def forced(backend, tau=1, rows=0, store=True):
    """Run one form regardless of what the plan would choose."""

    def run(t):
        w_in, w_out = torch.cat([t[3], t[4]]), torch.cat([t[5], -t[6]], 1)
        return _run(t[0], Operands(t[1], t[2], w_in, w_out, t[7]), t[8], backend, tau, rows, store)

    return run


def check(results, oracle, assert_close, dtype=torch.float32):
    for name, expected in oracle.items():
        assert_close(results[name].to(torch.float64), expected, name, dtype)


def test_reference_is_the_definition():
    u, log_decay, phase, b_re, b_im, c_re, c_im, D, start = random_inputs(2, 9, 3, 4)
    lam, B, C = torch.exp(torch.complex(log_decay, phase)), torch.complex(b_re, b_im), torch.complex(c_re, c_im)
    h = torch.complex(start[:, :4], start[:, 4:])
    y, last = lti_scan(u, lam.log(), B, C, D, initial_state=h, return_last_state=True)
    for t in range(9):
        h = lam * h + u[:, t].cdouble() @ B.T
        torch.testing.assert_close(y[:, t], (h @ C.T).real + D * u[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["lru_N16_H4_L64", "lru_N32_H16_L64", "lru_N64_H8_L64"])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_golden(golden, assert_close, name, backend):
    g = golden(name)
    dtype = torch.float64 if backend == "reference" else torch.float32
    names = ["nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im", "D", "x"]
    p = {key: g[key].to(dtype).requires_grad_() for key in names}
    gamma = p["gamma_log"].exp()[:, None]
    y, last = lti_scan_planar(
        p["x"][None], -p["nu_log"].exp(), p["theta_log"].exp(), gamma * p["B_re"], gamma * p["B_im"],
        p["C_re"], p["C_im"], p["D"], return_last_state=True, backend=backend,
    )  # fmt: skip
    assert_close(y[0].detach(), g["y"], "y")
    assert_close(torch.complex(*last[0].detach().chunk(2)), g["states"][-1], "last state", dtype)
    (y[0] * g["w"].to(dtype)).sum().backward()
    for key in names:
        assert_close(p[key].grad, g[f"grad_{key}"], key)


SHAPES = [(1, 1, 1, 1), (2, 33, 3, 5), (3, 57, 4, 12), (2, 257, 2, 13), (1, 40, 3, 100), (2, 21, 5, 128), (1, 9, 2, 300)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.usefixtures("poisoned_memory")
def test_cpp_forms(assert_close, shape, initial):
    inputs = random_inputs(*shape)
    if not initial:
        inputs[8] = None
    oracle = evaluate(public("reference"), inputs, torch.float64)
    check(evaluate(public(), inputs, torch.float32), oracle, assert_close)
    for store in (False, True):
        for rows in (4, 17, 1000):
            check(evaluate(forced("cpp", rows=rows, store=store), inputs, torch.float32), oracle, assert_close)
    for tau in (2, 7, 16):
        if tau <= shape[1]:
            run = forced("cpp", tau=tau, rows=64)
            check(evaluate(run, inputs, torch.float32), oracle, assert_close)


def test_every_instruction_set(assert_close, isa):
    assert cpp.library().isa() == isa
    inputs = random_inputs(3, 29, 4, 93)
    oracle = evaluate(public("reference"), inputs, torch.float64)
    check(evaluate(forced("cpp", rows=11, store=False), inputs, torch.float32), oracle, assert_close)


def test_more_sequences_than_lanes_and_grouping(assert_close):
    inputs = random_inputs(70, 5, 2, 3)
    oracle = evaluate(public("reference"), inputs, torch.float64)
    for rows in (5, 23, 512):
        check(evaluate(forced("cpp", rows=rows, store=False), inputs, torch.float32), oracle, assert_close)


def test_rectangular(assert_close):
    inputs = random_inputs(2, 19, 3, 6, outputs=5)
    oracle = evaluate(public("reference"), inputs, torch.float64)
    check(evaluate(public("cpp"), inputs, torch.float32), oracle, assert_close)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_float32_state(assert_close, dtype, backend):
    inputs = [None if t is None else t.to(dtype).to(torch.float64) for t in random_inputs(2, 65, 4, 9)]
    oracle = evaluate(public("reference"), inputs, torch.float64)
    results = evaluate(public(backend), inputs, dtype)
    assert results["y"].dtype == dtype
    assert results["last"].dtype == torch.float32
    assert_close(results["last"], oracle["last"], "last")
    check(results, oracle, assert_close, dtype)


@pytest.mark.parametrize("tau", [2, 5, 8])
def test_block_form_is_exact_in_float64(assert_close, tau):
    inputs = random_inputs(2, 37, 3, 6)
    oracle = evaluate(public("reference"), inputs, torch.float64)
    results = evaluate(forced("reference", tau=tau), inputs, torch.float64)
    check(results, oracle, assert_close, torch.float64)


def test_block_tables_and_toeplitz():
    blocks = torch.randn(4, 2, 3, dtype=torch.float64)
    matrix = toeplitz(blocks).reshape(4, 2, 4, 3)
    for i in range(4):
        for j in range(4):
            expected = blocks[i - j] if i >= j else torch.zeros(2, 3, dtype=torch.float64)
            assert torch.equal(matrix[i, :, j], expected)
    _, log_decay, phase, b_re, b_im, c_re, c_im, D, _ = random_inputs(1, 1, 2, 3)
    tables = block_tables(log_decay, phase, torch.cat([b_re, b_im]), torch.cat([c_re, -c_im], 1), D, 4)
    assert tables.w_in.shape == (6, 8)
    assert tables.w_out.shape == (8, 6)
    assert tables.feed.shape == (8, 8)


@pytest.mark.parametrize("tau", [1, 2, 7])
@pytest.mark.parametrize(("channels", "outputs", "feedthrough"), [(3, 3, True), (3, 3, False), (5, 2, False), (1, 4, False)])
@pytest.mark.usefixtures("poisoned_memory")
def test_block_tables_in_cpp(assert_close, channels, outputs, feedthrough, tau):
    _, log_decay, phase, b_re, b_im, _, _, D, _ = random_inputs(1, 1, channels, 13)
    inputs = [log_decay, phase, torch.cat([b_re, b_im]), torch.randn(outputs, 26).double(), D if feedthrough else None]

    def run(tables, dtype):
        leaves = [None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in inputs]
        results = tables(*leaves, tau)
        draw = torch.Generator().manual_seed(3)
        loss = sum((torch.randn(t.shape, generator=draw).to(dtype) * t).sum() for t in results)
        return [*results, *torch.autograd.grad(loss, [t for t in leaves if t is not None])]

    oracle = run(block_tables, torch.float64)
    for k, (actual, expected) in enumerate(zip(run(cpp.library().lti_tables, torch.float32), oracle, strict=True)):
        assert_close(actual.detach().double(), expected.detach(), str(k), torch.float32)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("initial", [False, True])
def test_diagonal_scan(assert_close, reverse, initial):
    log_decay, phase = torch.rand(13).double().neg() * 0.2, torch.rand(13).double() * 6
    x, start = torch.randn(3, 41, 26).double(), torch.randn(3, 26).double() if initial else None
    weight = torch.randn(3, 41, 26).double()

    def run(dtype, backend):
        leaves = [None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in (x, log_decay, phase, start)]
        h = diagonal_scan(*leaves[:3], initial_state=leaves[3], reverse=reverse, backend=backend)
        (h * weight.to(dtype)).sum().backward()
        return [h.detach(), *(t.grad for t in leaves if t is not None)]

    for actual, oracle in zip(run(torch.float32, "cpp"), run(torch.float64, "reference"), strict=True):
        assert_close(actual, oracle)


@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 4), st.integers(1, 9), st.integers(1, 50), st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_splitting_a_sequence_changes_nothing(batch, length, channels, states, cut, seed):
    inputs = [t.float() for t in random_inputs(batch, length, channels, states, seed=seed)]
    u, rest, start = inputs[0], inputs[1:8], inputs[8]
    cut = min(cut, length)
    y, last = lti_scan_planar(u, *rest, initial_state=start, return_last_state=True)
    first, middle = lti_scan_planar(u[:, :cut], *rest, initial_state=start, return_last_state=True)
    second, end = lti_scan_planar(u[:, cut:], *rest, initial_state=middle, return_last_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), y, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(end, last, rtol=1e-3, atol=1e-3)


def test_empty_sequences_and_batches():
    inputs = random_inputs(2, 6, 3, 4)
    for u in (inputs[0][:, :0], inputs[0][:0]):
        start = inputs[8][: u.shape[0]]
        for dtype in (torch.float32, torch.float64):
            leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (u, *inputs[1:8], start)]
            y, last = lti_scan_planar(*leaves[:8], initial_state=leaves[8], return_last_state=True)
            assert y.shape == u.shape
            assert torch.equal(last, start.to(dtype))
            (y.sum() + last.sum()).backward()
            assert torch.equal(leaves[8].grad, torch.ones_like(start, dtype=dtype))
            assert not leaves[3].grad.any()


def test_non_contiguous_input(assert_close):
    inputs = random_inputs(2, 33, 4, 5)
    inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    oracle = evaluate(public("reference"), inputs, torch.float64)
    check(evaluate(public("cpp"), inputs, torch.float32), oracle, assert_close)


def test_same_result_for_any_thread_count():
    inputs = [t.float() for t in random_inputs(6, 300, 4, 33)]
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(evaluate(forced("cpp", rows=128), inputs, torch.float32))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-6, atol=1e-6, msg=name)


def shapes(batch, length, channels, states):
    return {"u": (batch, length, channels), "B": (states, channels), "C": (channels, states)}


def test_plan_says_what_runs():
    small, wide = shapes(50, 784, 8, 256), shapes(16, 1024, 512, 384)
    assert plan("lti_scan", small).form == "block"
    assert plan("lti_scan", small).backend == "cpp"
    assert plan("lti_scan", wide).form == "scan"
    assert plan("lti_scan", small, torch.float64).backend == "reference"
    assert plan("lti_scan", small, backend="reference").form == "scan"
    assert plan("lti_scan", small) is plan("lti_scan", small)
    assert "cpp block" in str(plan("lti_scan", small))
    assert plan("lti_scan", small).get("tau") > 1
    assert plan("gramians", small).backend == "cpp"


@pytest.mark.skipif(cpp.why_not() is not None or not cpp.parallel(), reason="no compiler, or one without OpenMP")
def test_kernels_use_torch_s_threads():
    for count in (1, 2, 3):
        with threads(count):
            assert cpp.library().threads() == count


def test_plan_names_wrong_input():
    with pytest.raises(ArgumentError, match=r"op: expected one of causal_conv1d, .*lti_scan.*, got 'scan'"):
        plan("scan", shapes(1, 2, 3, 4))
    with pytest.raises(ArgumentError, match=r"u \(batch, L, H\)"):
        plan("lti_scan", {"B": (4, 3), "C": (3, 4)})
    with pytest.raises(ArgumentError, match=r"B \(N, H\)"):
        plan("lti_scan", {**shapes(1, 2, 3, 4), "B": (3, 4)})


def test_custom_ops_are_well_formed():
    u, log_decay, phase, b_re, b_im, c_re, c_im, D, start = (t.float() for t in random_inputs(2, 12, 3, 4))
    args = [u, log_decay, phase, torch.cat([b_re, b_im]), torch.cat([c_re, -c_im], 1), D, start]
    args = [t.requires_grad_() for t in args]
    for backend, stepwise in (("cpp", False), ("reference", False), ("reference", True)):
        torch.library.opcheck(torch.ops.compressm.lti_scan.default, (*args, backend, stepwise))
    x = torch.randn(2, 7, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.compressm.diagonal_scan.default, (x, log_decay, phase, None, True, "cpp"))


@pytest.mark.parametrize("sizes", [(2, 5, 3, 0), (0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 0, 4)])
@pytest.mark.parametrize("initial", [False, True])
def test_sizes_of_zero(sizes, initial):
    inputs = random_inputs(*sizes)
    if not initial:
        inputs[8] = None
    oracle = evaluate(public("reference"), inputs, torch.float64)
    for name, result in evaluate(public("cpp"), inputs, torch.float32).items():
        torch.testing.assert_close(result.double(), oracle[name], rtol=1e-5, atol=1e-5)


def test_gradients_lie_with_their_arguments_whatever_the_default_device():
    u, log_decay, phase, b_re, b_im, c_re, c_im, _, _ = (None if t is None else t.float() for t in random_inputs(2, 5, 3, 4))
    arguments = (u, log_decay, phase, torch.cat([b_re, b_im]), torch.cat([c_re, -c_im], 1), None, None)
    with torch.device("meta"):
        grads = lti_scan_backward_op(torch.ones_like(u), None, *arguments, "cpp", False)
    assert [grad.device.type for grad in grads] == ["cpu"] * 7


def test_raw_operators_refuse_operands_that_do_not_fit():
    library, N = torch.ops.compressm_cpp, 8
    u, w_in, w_out = torch.randn(1, 4, 2), torch.ones(2 * N, 2), torch.ones(2, 2 * N)
    good = [u, torch.full((N,), -0.1), torch.full((N,), 0.2), w_in, w_out, None, None, False, False, 4]
    y, last, saved = library.lti_core(*good)
    wrong = [
        (1, torch.full((1,), -0.1)), (2, torch.zeros(2 * N)), (3, torch.ones(2 * N, 3)), (4, torch.ones(2, N)),
        (5, torch.ones(3)), (5, torch.ones(2, 3)), (6, torch.zeros(1, 2)), (9, 0),
    ]  # fmt: skip
    for place, value in wrong:
        with pytest.raises(RuntimeError, match="expected"):
            library.lti_core(*good[:place], value, *good[place + 1 :])
    backward = [y, last, *good[:7], saved, False, False, 4, True]
    library.lti_core_backward(*backward)
    for place, value in [(1, last[:, :2]), (3, torch.zeros(2)), (9, saved[..., :3].contiguous()), (9, saved[:, :0])]:
        with pytest.raises(RuntimeError, match="expected"):
            library.lti_core_backward(*backward[:place], value, *backward[place + 1 :])
    x, four = torch.randn(2, 5, 8), torch.zeros(4)
    for op, operands in (
        (library.diagonal_scan, (x, torch.zeros(1), four, None, False)),
        (library.diagonal_scan, (x, four, four, torch.zeros(2, 3), False)),
        (library.diagonal_scan_backward, (x[..., :2], x, four, four, None, False)),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            op(*operands)


@pytest.mark.slow
def test_compiles_into_one_graph(assert_close):
    inputs = random_inputs(2, 32, 3, 5)
    oracle = evaluate(public("reference"), inputs, torch.float64)
    compiled = torch.compile(public(), fullgraph=True, backend="aot_eager")
    check(evaluate(compiled, inputs, torch.float32), oracle, assert_close)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"u": torch.zeros(2, 3)}, "u:"),
        ({"u": torch.zeros(2, 3, 3, dtype=torch.int64)}, "u:"),
        ({"log_lam": torch.zeros(4)}, "log_lam"),
        ({"B": torch.zeros(4, 2, dtype=torch.cfloat)}, "B:"),
        ({"C": torch.zeros(3, 5, dtype=torch.cfloat)}, "C:"),
        ({"D": torch.zeros(4)}, "D:"),
        ({"initial_state": torch.zeros(1, 4, dtype=torch.cfloat)}, "initial_state"),
    ],
)
def test_wrong_arguments_are_named(change, word):
    c = torch.cfloat
    arguments = {
        "u": torch.zeros(2, 6, 3), "log_lam": torch.zeros(4, dtype=c), "B": torch.zeros(4, 3, dtype=c),
        "C": torch.zeros(3, 4, dtype=c), "D": torch.zeros(3), "initial_state": torch.zeros(2, 4, dtype=c),
    }  # fmt: skip
    lti_scan(**arguments)
    with pytest.raises(ArgumentError, match=word):
        lti_scan(**{**arguments, **change})


def test_backends_that_cannot_run_say_why():
    inputs = [t for t in random_inputs(1, 3, 2, 2)]
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        lti_scan_planar(*inputs[:8], backend="cpp")
    with pytest.raises(BackendError, match="expected one of"):
        lti_scan_planar(*inputs[:8], backend="cuda")


def test_reference_scan_of_no_steps():
    x = torch.zeros(2, 0, 4)
    assert reference.diagonal_scan(x, torch.zeros(2), torch.zeros(2)).shape == (2, 0, 4)
