"""The short causal convolution: the reference by definition, the C++ kernels against it, what bad input gets."""

from __future__ import annotations

import pytest
import torch
from kernels.causal_conv1d_cases import LAYOUTS, check, evaluate, lay_out, random_inputs
from kernels.evaluation import check_threads
from torch.nn import functional as F

from compressm.errors import ArgumentError, BackendError
from compressm.kernels import causal_conv1d
from compressm.kernels.causal_conv1d import cpu

CHANNELS, LENGTHS, WIDTHS = (1, 3, 16, 17, 40), (1, 2, 3, 33, 257), (1, 2, 4, 8)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_reference_is_conv1d(assert_close, width, activation):
    inputs = random_inputs(2, 5, 12, width)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    for before in (torch.zeros_like(inputs["initial_states"]), inputs["initial_states"]):
        expected = F.conv1d(torch.cat([before, x], -1), weight[:, None], bias, groups=5)
        expected = F.silu(expected) if activation else expected
        state = before if before.any() else None
        assert_close(causal_conv1d(x, weight, bias, activation=activation, initial_states=state), expected)


@pytest.mark.parametrize("length", [2, 5])
def test_reference_gradients(length):
    inputs = [t.requires_grad_() for t in random_inputs(2, 3, length, 4).values()]

    def call(x, weight, bias, state):
        return causal_conv1d(x, weight, bias, activation="silu", initial_states=state, return_final_states=True)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.usefixtures("poisoned_memory")
def test_cpp(assert_close, cpp_calls, layout, width):
    for channels in CHANNELS:
        for length in LENGTHS:
            inputs = random_inputs(2, channels, length, width)
            oracle = evaluate(inputs, torch.float64, "reference")
            with cpp_calls() as seen:
                results = evaluate(inputs, torch.float32, None, layout=layout)
            check(results, oracle, assert_close, torch.float32)
            assert seen == {"causal_conv1d": 1, "causal_conv1d_backward": 1}


@pytest.mark.parametrize("layout", ["steps", "channels"])
@pytest.mark.parametrize("without", [(), ("bias",), ("initial_states",), ("bias", "initial_states")], ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.usefixtures("poisoned_memory")
def test_cpp_without_optional_arguments(assert_close, layout, without, activation):
    for width, length in ((3, 41), (5, 3), (6, 300), (7, 20)):
        inputs = random_inputs(3, 19, length, width, without=without)
        oracle = evaluate(inputs, torch.float64, "reference", activation=activation)
        results = evaluate(inputs, torch.float32, "cpp", layout=layout, activation=activation)
        check(results, oracle, assert_close, torch.float32)


@pytest.mark.parametrize("layout", ["steps", "channels"])
@pytest.mark.parametrize("length", [255, 256, 258, 600])
@pytest.mark.usefixtures("poisoned_memory")
def test_cpp_joins_stretches_and_channel_blocks(assert_close, layout, length):
    inputs = random_inputs(1, 530, length, 8)
    oracle = evaluate(inputs, torch.float64, "reference")
    check(evaluate(inputs, torch.float32, "cpp", layout=layout), oracle, assert_close, torch.float32)


def test_every_instruction_set(assert_close, isa):
    for width in WIDTHS:
        inputs = random_inputs(2, 39, 45, width)
        oracle = evaluate(inputs, torch.float64, "reference")
        for layout in ("steps", "channels"):
            check(evaluate(inputs, torch.float32, "cpp", layout=layout), oracle, assert_close, torch.float32)


@pytest.mark.parametrize("layout", ["steps", "channel slice"])
def test_same_bits_for_any_thread_count(layout):
    inputs = random_inputs(3, 70, 530, 4)
    check_threads(lambda: evaluate(inputs, torch.float32, "cpp", layout=layout))


def test_activation_at_its_extremes():
    x = torch.tensor([-1e30, -200.0, -88.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 88.0, 200.0, 1e30]).repeat(2, 1)
    for layout in ("steps", "channels"):
        leaf = lay_out(x[None], layout).requires_grad_()
        out = causal_conv1d(leaf, torch.ones(2, 1), activation="silu", backend="cpp")
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        wide = x[None].double().requires_grad_()
        (expected,) = torch.autograd.grad(F.silu(wide).sum(), wide)
        torch.testing.assert_close(out.double(), F.silu(wide), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_nan_stays_where_its_window_reaches():
    for layout in ("steps", "channels"):
        x = torch.randn(1, 20, 40)
        x[0, 5, 17] = float("nan")
        out = causal_conv1d(lay_out(x, layout), torch.randn(20, 4), activation="silu", backend="cpp")
        expected = torch.zeros(1, 20, 40, dtype=torch.bool)
        expected[0, 5, 17:21] = True
        assert torch.equal(out.isnan(), expected)


@pytest.mark.parametrize("layout", ["channels", "channel slice"])
def test_output_and_gradient_lie_like_the_input(layout):
    x = lay_out(torch.randn(2, 8, 9), layout).requires_grad_()
    out = causal_conv1d(x, torch.randn(8, 4), activation="silu")
    assert out.mT.is_contiguous()
    assert torch.autograd.grad(out.sum(), x)[0].mT.is_contiguous()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(assert_close, backend, dtype):
    inputs = {name: t.to(dtype).double() for name, t in random_inputs(2, 20, 65, 4).items()}
    oracle = evaluate(inputs, torch.float64, "reference")
    results = evaluate(inputs, dtype, backend, layout="channels")
    assert {t.dtype for t in results.values()} == {dtype}
    check(results, oracle, assert_close, dtype)


@pytest.mark.usefixtures("poisoned_memory")
def test_bfloat16_rows_of_channels_are_taken_as_they_lie(assert_close, monkeypatch, isa):
    seen = []
    inner = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda x, *rest: seen.append(x.dtype) or inner(x, *rest))
    for channels, length, without in ((37, 45, ()), (530, 258, ("bias",)), (3, 2, ("initial_states",))):
        inputs = random_inputs(2, channels, length, 4, without=without)
        inputs = {name: None if t is None else t.to(torch.bfloat16).double() for name, t in inputs.items()}
        oracle = evaluate(inputs, torch.float64, "reference")
        results = evaluate(inputs, torch.bfloat16, "cpp", layout="channels")
        check(results, oracle, assert_close, torch.bfloat16)
    assert seen == [torch.bfloat16] * 3


def test_bfloat16_is_rounded_as_torch_rounds_it(isa):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)  # every bfloat16 there is
    x, weight = bits.view(torch.bfloat16).view(1, 64, 1024), torch.tensor([1.0, -0.7]).repeat(32)[:, None]
    out = causal_conv1d(x.mT.contiguous().mT, weight, backend="cpp")
    expected = (x.float() * weight + 0.0).bfloat16()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("width", WIDTHS)
def test_chunks_are_the_whole(assert_close, backend, width):
    inputs = random_inputs(2, 18, 40, width)

    def in_chunks(x, weight, bias, initial_states, **options):
        outs, state = [], initial_states
        for chunk in x.split([1, 2, 0, 30, 7], -1):
            out, state = causal_conv1d(chunk, weight, bias, initial_states=state, **options)
            outs.append(out)
        return torch.cat(outs, -1), state

    dtype = torch.float32 if backend == "cpp" else torch.float64
    oracle = evaluate(inputs, torch.float64, "reference")
    check(evaluate(inputs, dtype, backend, call=in_chunks), oracle, assert_close, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 5, 0), (2, 0, 7)])
def test_nothing_in_nothing_out(dtype, shape):
    inputs = random_inputs(*shape, 4)
    results = evaluate(inputs, dtype, None)
    assert results["out"].shape == shape
    assert results["last"].shape == (*shape[:2], 3)
    assert not results["weight"].any()
    if shape[2] == 0:
        assert torch.equal(results["last"], inputs["initial_states"].to(dtype))


def test_custom_ops_are_well_formed():
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    for layout in LAYOUTS:
        for without in ((), ("bias", "initial_states")):
            inputs = {name: t if t is None else t.float() for name, t in random_inputs(2, 5, 9, 4, without=without).items()}
            inputs["x"] = lay_out(inputs["x"], layout)
            x, weight, bias, states = (None if t is None else t.requires_grad_() for t in inputs.values())
            args = (x, weight, bias, None, states, None)
            torch.library.opcheck(torch.ops.compressm.causal_conv1d.default, (*args, True, "cpp"), test_utils=tests)
            backward = (torch.randn(2, 5, 9), *(None if t is None else t.detach() for t in args), True, "cpp")
            checks = ("test_schema", "test_faketensor")
            torch.library.opcheck(torch.ops.compressm.causal_conv1d_backward.default, backward, test_utils=checks)


@pytest.mark.parametrize("layout", ["steps", "channel slice"])
def test_compiles_into_one_graph(assert_close, layout):
    inputs = random_inputs(2, 5, 12, 4)
    oracle = evaluate(inputs, torch.float64, "reference")
    compiled = torch.compile(causal_conv1d, fullgraph=True, backend="aot_eager")
    check(evaluate(inputs, torch.float32, None, layout=layout, call=compiled), oracle, assert_close, torch.float32)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("x", lambda t: t[0]),
        ("x", lambda t: t.long()),
        ("weight", lambda t: t[1:]),
        ("weight", lambda t: t[:, None]),
        ("weight", lambda t: t[:, :0]),
        ("bias", lambda t: t[1:]),
        ("bias", lambda t: t.to("meta")),
        ("initial_states", lambda t: t[..., 1:]),
        ("initial_states", lambda t: t.long()),
        ("activation", lambda t: "relu"),
    ],
)
def test_wrong_arguments_are_named(name, wrong):
    arguments = {**random_inputs(2, 5, 9, 4), "activation": "silu"}
    arguments[name] = wrong(arguments[name])
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        causal_conv1d(**arguments)


def test_backends_that_cannot_run_say_why():
    inputs = random_inputs(1, 2, 3, 2)
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        causal_conv1d(**inputs, backend="cpp")
    with pytest.raises(BackendError, match="expected one of"):
        causal_conv1d(**inputs, backend="cuda")
