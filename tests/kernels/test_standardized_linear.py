"""The linear layer behind a standardisation: values and gradients in float64, threads, what torch computes, bad input."""

from __future__ import annotations

import pytest
import torch
from kernels.evaluation import check_threads
from kernels.layouts import lay_out
from torch.nn import functional as F

from compressm.errors import ArgumentError, BackendError
from compressm.kernels.fused_cpu import standardized_linear
from compressm.kernels.fused_cpu.standardized_linear import MAX_INPUTS

NAMES = ("x", "mean", "std", "weight", "bias")
SIZES = [(1, 1), (1, 8), (2, 7), (3, 12), (5, 16), (8, 33), (9, 4)]  # inputs, outputs; the last are too many inputs
ROWS = [(1,), (2, 33), (1100, 2)]


def random_inputs(rows, inputs, outputs, dtype=torch.uint8):
    """Bytes, or numbers like them, and float64 parameters that are exact in float32."""
    draw = torch.Generator().manual_seed(inputs + outputs)
    x = torch.randint(0, 256, (*rows, inputs), generator=draw).to(dtype)
    mean, std = 100 + 50 * torch.rand(inputs, generator=draw), 20 + 50 * torch.rand(inputs, generator=draw)
    weight, bias = torch.randn(outputs, inputs, generator=draw), torch.randn(outputs, generator=draw)
    return dict(zip(NAMES, (x, mean.double(), std.double(), weight.double(), bias.double()), strict=True))


def evaluate(inputs, dtype, backend=None, *, bias=True, layout="dense", call=standardized_linear):
    """Output and gradients by name."""
    mean, std, *trained = (lay_out(inputs[name].to(dtype), layout) for name in NAMES[1:])
    x = inputs["x"] if layout == "dense" else torch.stack([inputs["x"]] * 2, -1)[..., 0]
    leaves = [t.requires_grad_() for t in trained[: 2 if bias else 1]]
    out = call(x, mean, std, *leaves, backend=backend)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, lay_out(weights, layout))
    return {"out": out.detach(), **dict(zip(("weight", "bias"), grads, strict=False))}


def check(results, oracle, assert_close):
    assert set(results) == set(oracle)
    for name, expected in oracle.items():
        assert_close(results[name].double(), expected, name, torch.float32)


@pytest.mark.parametrize("layout", ["dense", "slice", "transposed"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
@pytest.mark.usefixtures("poisoned_memory")
def test_values_and_gradients(assert_close, cpp_calls, layout, dtype):
    for inputs, outputs in SIZES:
        for rows in ROWS:
            for bias in (True, False):
                given = random_inputs(rows, inputs, outputs, dtype)
                with cpp_calls() as seen:
                    results = evaluate(given, torch.float32, bias=bias, layout=layout)
                names = ("standardized_linear", "standardized_linear_backward")
                assert seen == (dict.fromkeys(names, 1) if inputs <= MAX_INPUTS else {})
                check(results, evaluate(given, torch.float64, bias=bias), assert_close)


def test_the_reference_is_its_definition():
    x, mean, std, weight, bias = random_inputs((2, 5), 3, 4).values()
    out = standardized_linear(x, mean, std, weight, bias, backend="reference")
    torch.testing.assert_close(out, F.linear((x.double() - mean) / std, weight, bias))


def test_same_bits_for_any_thread_count():
    given = random_inputs((50, 157), 3, 12)
    check_threads(lambda: evaluate(given, torch.float32, "cpp"))


def test_autocast_and_other_dtypes_are_torchs(cpp_calls):
    given = random_inputs((2, 9), 3, 4)
    x, *parameters = (t if name == "x" else t.float() for name, t in given.items())
    with cpp_calls() as seen:
        with torch.autocast("cpu", torch.bfloat16):
            assert standardized_linear(x, *parameters).dtype == torch.bfloat16
        assert standardized_linear(x, *(t.bfloat16() for t in parameters)).dtype == torch.bfloat16
        assert standardized_linear(x, *(t.double() for t in parameters)).dtype == torch.float64
    assert not seen
    assert standardized_linear(x[:0], *parameters).shape == (0, 9, 4)


def test_compiles_into_one_graph(assert_close):
    given = random_inputs((2, 9), 3, 4)
    compiled = torch.compile(standardized_linear, fullgraph=True, backend="aot_eager")
    check(evaluate(given, torch.float32, call=compiled), evaluate(given, torch.float64), assert_close)


def test_custom_ops_are_well_formed():
    x, *parameters = (t if name == "x" else t.float() for name, t in random_inputs((2, 9), 3, 4).items())
    mean, std, weight, bias = parameters
    arguments = (x, mean, std, weight.requires_grad_(), bias.requires_grad_())
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.compressm.standardized_linear.default, arguments, test_utils=tests)
    backward = (torch.randn(2, 9, 4), x, mean, std, weight.detach())
    torch.library.opcheck(torch.ops.compressm.standardized_linear_backward.default, backward, test_utils=tests[:2])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("x", lambda t: t.cfloat()),
        ("x", lambda t: t[0, 0, 0]),
        ("x", lambda t: t.double().requires_grad_()),
        ("mean", lambda t: t[:2]),
        ("mean", lambda t: t.requires_grad_()),
        ("std", lambda t: t.double()),
        ("weight", lambda t: t[:, :2]),
        ("weight", lambda t: t[0]),
        ("bias", lambda t: t[:3]),
        ("bias", lambda t: t.to("meta")),
    ],
)
def test_wrong_arguments_are_named(name, wrong):
    arguments = {key: t if key == "x" else t.float() for key, t in random_inputs((2, 9), 3, 4).items()}
    standardized_linear(**arguments)
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        standardized_linear(**{**arguments, name: wrong(arguments[name])})


def test_backends_that_cannot_run_say_why():
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        standardized_linear(**random_inputs((2, 9), 3, 4), backend="cpp")
