"""Several sequences in one row of the causal convolution: seq_idx and cu_seqlens, with states, on every layout and backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernels.causal_conv1d_cases import LAYOUTS, check, evaluate, lay_out, random_inputs
from kernels.evaluation import check_threads

from compressm.errors import ArgumentError, BackendError
from compressm.kernels import causal_conv1d
from compressm.kernels.causal_conv1d import cpu

BOUNDS = ((0, 3, 4, 10, 12), (0, 0, 1, 1, 2, 2, 40), (0, 257), (0, 300, 558, 560, 561, 900), tuple(range(0, 301, 3)))
# Sequences one behind the other, padding in front, between and behind, and sequences that come again within the filter's reach.
NUMBERS = ([0] * 5 + [1] + [2] * 20, [-1, -1, 4, 4, 4, -3, 4, 7, 7, -1, -1], [0, 1, 0, 1, 2, 0, 0, 0, 0, 2, 2, 1] * 3, [-1] * 4)


def by_definition(x, weight, bias, seq_idx):
    """The sum over the taps that meet a step of the same sequence, one by one."""
    out, width = torch.zeros_like(x), weight.shape[1]
    for row, numbers in enumerate(seq_idx.tolist()):
        for t, k in itertools.product(range(len(numbers)), range(width)):
            s = t - width + 1 + k
            if numbers[t] >= 0 and k == 0:
                out[row, :, t] += bias
            if numbers[t] >= 0 and s >= 0 and numbers[s] == numbers[t]:
                out[row, :, t] += weight[:, k] * x[row, :, s]
    return out


def one_by_one(x, weight, bias, initial_states, cu_seqlens, **options):
    """The sequences that cu_seqlens packs, each in a call of its own."""
    bounds = cu_seqlens.tolist()
    states = [None] * (len(bounds) - 1) if initial_states is None else initial_states.split(1)
    parts = [
        causal_conv1d(x[..., a:b], weight, bias, initial_states=state, **options)
        for (a, b), state in zip(itertools.pairwise(bounds), states, strict=True)
    ]
    outs, finals = zip(*parts, strict=True)
    return torch.cat(outs, -1), torch.cat(finals)


@pytest.mark.parametrize("numbers", NUMBERS, ids=len)
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_a_step_sees_its_own_sequence(assert_close, numbers, width):
    x, weight, bias, _ = random_inputs(2, 3, len(numbers), width).values()
    seq_idx = torch.tensor([numbers, numbers[::-1]], dtype=torch.int32)
    expected = by_definition(x, weight, bias, seq_idx)
    assert_close(causal_conv1d(x, weight, bias, seq_idx), expected)
    out = causal_conv1d(x.float(), weight.float(), bias.float(), seq_idx, backend="cpp")
    assert_close(out, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("numbers", NUMBERS, ids=len)
@pytest.mark.usefixtures("poisoned_memory")
def test_gradients_of_numbered_sequences(assert_close, cpp_calls, layout, numbers):
    for width, channels, activation in ((1, 3, None), (2, 17, "swish"), (4, 16, "silu"), (8, 530, "silu")):
        inputs = random_inputs(2, channels, len(numbers), width, without=["initial_states"])
        options = {"activation": activation, "final": False, "seq_idx": torch.tensor([numbers, numbers[::-1]])}
        oracle = evaluate(inputs, torch.float64, "reference", **options)
        with cpp_calls() as seen:
            results = evaluate(inputs, torch.float32, None, layout=layout, **options)
        check(results, oracle, assert_close, torch.float32)
        assert seen == {"causal_conv1d": 1, "causal_conv1d_backward": 1}


@pytest.mark.parametrize("layout", ["steps", "channels", "odd"])
@pytest.mark.parametrize("bounds", BOUNDS, ids=len)
@pytest.mark.parametrize("without", [(), ("initial_states",), ("bias", "initial_states")], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_packed_sequences_are_the_sequences(assert_close, layout, bounds, without):
    inputs = random_inputs(1, 19, bounds[-1], 4, without=without, sequences=len(bounds) - 1)
    for dtype in (torch.int32, torch.int64):
        options = {"cu_seqlens": torch.tensor(bounds, dtype=dtype)}
        oracle = evaluate(inputs, torch.float64, "reference", call=one_by_one, **options)
        check(evaluate(inputs, torch.float64, None, **options), oracle, assert_close, torch.float64)
        check(evaluate(inputs, torch.float32, "cpp", layout=layout, **options), oracle, assert_close, torch.float32)


@pytest.mark.parametrize("width", [1, 2, 3, 8])
def test_widths(assert_close, width):
    options = {"cu_seqlens": torch.tensor([0, 1, 3, 3, 20, 21])}
    inputs = random_inputs(1, 6, 21, width, sequences=5)
    oracle = evaluate(inputs, torch.float64, "reference", call=one_by_one, **options)
    for layout in ("steps", "channels"):
        check(evaluate(inputs, torch.float32, "cpp", layout=layout, **options), oracle, assert_close, torch.float32)


@pytest.mark.parametrize("layout", ["steps", "channels"])
@pytest.mark.usefixtures("poisoned_memory")
def test_bfloat16_runs_as_it_is(assert_close, monkeypatch, isa, layout):
    seen = []
    inner = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda x, *rest: seen.append(x.dtype) or inner(x, *rest))
    inputs = random_inputs(1, 37, 45, 4, sequences=3)
    inputs = {name: t.to(torch.bfloat16).double() for name, t in inputs.items()}
    options = {"cu_seqlens": torch.tensor([0, 2, 2, 45])}
    oracle = evaluate(inputs, torch.float64, "reference", **options)
    check(evaluate(inputs, torch.bfloat16, "cpp", layout=layout, **options), oracle, assert_close, torch.bfloat16)
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("layout", ["steps", "channels"])
def test_the_output_lies_like_the_input(layout):
    x = lay_out(torch.randn(2, 8, 9), layout).requires_grad_()
    out = causal_conv1d(x, torch.randn(8, 4), seq_idx=torch.zeros(2, 9, dtype=torch.int32))
    assert out.stride() == torch.autograd.grad(out.sum(), x)[0].stride() == x.stride()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_nothing_leaks_out_of_a_sequence(backend):
    x = torch.randn(1, 6, 12)
    x[..., 4:8] = float("nan")
    seq_idx = torch.tensor([[0] * 4 + [1] * 4 + [2] * 4])
    leaf = x.clone().requires_grad_()
    out = causal_conv1d(leaf, torch.randn(6, 4), seq_idx=seq_idx, backend=backend)
    assert torch.equal(out.isnan().any(1)[0], seq_idx[0] == 1)
    grad = torch.autograd.grad(out[..., :4].sum() + out[..., 8:].sum(), leaf)[0]
    assert not grad[..., 4:8].any()
    assert torch.isfinite(grad).all()


def test_same_bits_for_any_thread_count():
    inputs = random_inputs(1, 600, 900, 4, sequences=6)
    bounds = torch.tensor([0, 300, 303, 558, 560, 561, 900])
    check_threads(lambda: evaluate(inputs, torch.float32, "cpp", cu_seqlens=bounds))


def test_gradcheck():
    inputs = [t.requires_grad_() for t in random_inputs(1, 2, 6, 3, sequences=3).values()]

    def call(x, weight, bias, states):
        return causal_conv1d(x, weight, bias, None, states, True, None, "silu", cu_seqlens=torch.tensor([0, 1, 1, 6]))

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("option", ["seq_idx", "cu_seqlens"])
@pytest.mark.parametrize("shape", [(1, 5, 0), (1, 0, 7), (0, 5, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_in_nothing_out(dtype, shape, option):
    packed = option == "cu_seqlens"
    if packed and shape[0] == 0:
        return
    inputs = random_inputs(*shape, 4, sequences=2 if packed else None, without=() if packed else ["initial_states"])
    value = torch.tensor([0, 0, shape[2]]) if packed else torch.zeros(shape[0], shape[2], dtype=torch.int32)
    results = evaluate(inputs, dtype, None, final=packed, **{option: value})
    assert results["out"].shape == results["x"].shape == shape
    assert not results["weight"].any()
    if packed:
        assert torch.equal(results["last"][0], inputs["initial_states"][0].to(dtype))
        assert results["last"].shape == results["initial_states"].shape == (2, shape[1], 3)


@pytest.mark.parametrize("option", ["seq_idx", "cu_seqlens"])
@pytest.mark.parametrize("layout", ["steps", "channels"])
def test_custom_ops_are_well_formed(option, layout):
    packed = option == "cu_seqlens"
    inputs = random_inputs(1, 5, 9, 4, sequences=2 if packed else None, without=() if packed else ["initial_states"])
    x, weight, bias, states = (None if t is None else t.float().requires_grad_() for t in inputs.values())
    x = lay_out(x.detach(), layout).requires_grad_()
    seq_idx, bounds = (None, torch.tensor([0, 2, 9])) if packed else (torch.tensor([[0] * 4 + [1] * 5]), None)
    arguments = (x, weight, bias, seq_idx, states, bounds)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.compressm.causal_conv1d.default, (*arguments, True, "cpp"), test_utils=tests)
    detached = [t if t is None else t.detach() for t in arguments]
    backward = (torch.randn(1, 5, 9), *detached, True, "cpp")
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.compressm.causal_conv1d_backward.default, backward, test_utils=checks)


@pytest.mark.parametrize("option", ["seq_idx", "cu_seqlens", None])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_one_graph_serves_every_size(option, backend):
    graphs, packed = [], option == "cu_seqlens"

    def call(x, weight, bias, states, option_):
        options = {} if option is None else {option: option_}
        states = {} if option == "seq_idx" else {"initial_states": states, "return_final_states": True}
        return causal_conv1d(x, weight, bias, activation="silu", backend=backend, **states, **options)

    def compiler(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=compiler)
    for batch, length in ((2, 9), (3, 14), (5, 2), (4, 300)):
        x, weight, bias, states = random_inputs(1 if packed else batch, 5, length, 4, sequences=batch).values()
        bounds = torch.linspace(0, length, batch + 1).long()
        value = bounds if packed else torch.bucketize(torch.arange(length), bounds[1:], right=True).expand(batch, length)
        given = [t.float() for t in (x, weight, bias, states)]
        for actual, expected in zip(compiled(*given, value), call(*given, value), strict=True):
            assert torch.equal(actual, expected)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seq_idx": torch.zeros(1, 8, dtype=torch.int32)}, "seq_idx"),
        ({"seq_idx": torch.zeros(1, 9)}, "seq_idx"),
        ({"seq_idx": torch.zeros(1, 9, dtype=torch.int32, device="meta")}, "seq_idx"),
        ({"seq_idx": torch.zeros(1, 9, dtype=torch.int32), "initial_states": torch.zeros(1, 5, 3)}, "seq_idx"),
        ({"seq_idx": torch.zeros(1, 9, dtype=torch.int32), "return_final_states": True}, "seq_idx"),
        ({"seq_idx": torch.zeros(1, 9, dtype=torch.int32), "cu_seqlens": torch.tensor([0, 9])}, "seq_idx"),
        ({"cu_seqlens": torch.tensor([0, 10])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([1, 9])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 9])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0.0, 9.0])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 4, 9]), "initial_states": torch.zeros(1, 5, 3)}, "initial_states"),
        ({"cu_seqlens": torch.tensor([0, 4, 9]), "final_states_out": torch.zeros(1, 5, 3)}, "final_states_out"),
        ({"x": torch.zeros(2, 5, 9), "cu_seqlens": torch.tensor([0, 9])}, "x"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(changes, name):
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        causal_conv1d(**{"x": torch.zeros(1, 5, 9), "weight": torch.zeros(5, 4), **changes})


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("x", lambda t: t[0]),
        ("x", lambda t: t.double()),
        ("weight", lambda t: t[1:]),
        ("weight", lambda t: t[:, :0]),
        ("weight", lambda t: t.repeat(1, 3)),
        ("weight", lambda t: t.double()),
        ("weight", lambda t: t[0]),
        ("bias", lambda t: t[1:]),
        ("bias", lambda t: t.bfloat16()),
        ("seq_idx", lambda t: torch.zeros(1, 8, dtype=torch.int32)),
        ("seq_idx", lambda t: torch.zeros(1, 9)),
        ("initial_states", lambda t: t[:1]),
        ("initial_states", lambda t: t[..., 1:]),
        ("initial_states", lambda t: t[0, 0]),
        ("initial_states", lambda t: t.bfloat16()),
        ("cu_seqlens", lambda t: torch.tensor([0, 2, 8])),
        ("cu_seqlens", lambda t: torch.tensor([0, 10, 9])),
        ("cu_seqlens", lambda t: torch.tensor([0, -1, 9])),
        ("cu_seqlens", lambda t: t.float()),
        ("cu_seqlens", lambda t: t[:0]),
        ("grad_out", lambda t: t[..., 1:]),
        ("grad_out", lambda t: t.bfloat16()),
        ("grad_out", lambda t: t[0]),
    ],
)
def test_the_raw_op_takes_no_short_operand(backward, name, wrong):
    from compressm.kernels.core import cpp

    x, weight, bias, states = (t.float() for t in random_inputs(1, 5, 9, 4, sequences=2).values())
    operands = {"x": x, "weight": weight, "bias": bias, "seq_idx": None, "initial_states": states}
    operands |= {"cu_seqlens": torch.tensor([0, 2, 9]), "silu": True}
    if backward:
        operands = {"grad_out": torch.ones(1, 5, 9), **operands}
    elif name == "grad_out":
        return
    operands[name] = wrong(operands[name])
    if name == "seq_idx":
        operands |= {"initial_states": None, "cu_seqlens": None}
    run = cpp.library().causal_conv1d_backward if backward else cpp.library().causal_conv1d
    with pytest.raises((RuntimeError, ValueError, IndexError), match=name if name != "x" else "expected"):
        run(*operands.values())


@pytest.mark.parametrize("width", [9, 12])
def test_wide_filters_run_on_the_reference(assert_close, cpp_calls, width):
    inputs = random_inputs(2, 3, 14, width)
    oracle = evaluate(inputs, torch.float64, "reference")
    with cpp_calls() as seen:
        results = evaluate(inputs, torch.float32, None)
    check(results, oracle, assert_close, torch.float32)
    assert not seen
    for backend in ("cpp", "triton"):
        with pytest.raises(BackendError, match="up to 8 taps"):
            evaluate(inputs, torch.float32, backend)


def test_triton_leaves_packed_calls_to_the_reference():
    x, weight = torch.randn(1, 3, 5), torch.randn(3, 4)
    with pytest.raises(BackendError, match="one sequence a row; seq_idx and cu_seqlens run on the reference"):
        causal_conv1d(x, weight, cu_seqlens=torch.tensor([0, 2, 5]), backend="triton")


def test_final_states_are_written_where_the_caller_wants_them(assert_close):
    x, weight, bias, states = (t.float() for t in random_inputs(2, 3, 7, 4).values())
    expected, last = causal_conv1d(x, weight, bias, None, states, True)
    pool = torch.full((2, 3, 3, 2), float("nan"))
    out, final = causal_conv1d(x, weight, bias, None, states, True, pool[..., 1], "silu")
    assert torch.equal(pool[..., 1], last)
    assert final.data_ptr() == pool[..., 1].data_ptr()
    assert pool[..., 0].isnan().all()
    assert_close(out, torch.nn.functional.silu(expected.double()))
    memory = torch.empty(2, 3, 3)
    assert torch.equal(causal_conv1d(x, weight, bias, initial_states=states, final_states_out=memory), expected)
    assert torch.equal(memory, last)


def test_states_by_the_names_of_the_scans():
    x, weight, state = torch.randn(2, 3, 5), torch.randn(3, 4), torch.randn(2, 3, 3)
    expected = causal_conv1d(x, weight, initial_states=state, return_final_states=True)
    actual = causal_conv1d(x, weight, initial_state=state, return_last_state=True)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    with pytest.raises(ArgumentError, match="one of the two names"):
        causal_conv1d(x, weight, initial_states=state, initial_state=state)
