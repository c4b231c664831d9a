"""The linear layer with its gate, dropout and residual: values and gradients under one mask, narrow and wide, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from kernels.evaluation import check_threads
from torch.nn import functional as F

from compressm.errors import ArgumentError, BackendError
from compressm.kernels.fused_cpu import glu_dropout_add, linear_glu_dropout_add

NAMES = ("x", "weight", "bias", "residual")
SIZES = ((1, 1), (8, 8), (3, 5), (7, 8), (6, 2))  # (inputs, channels) of narrow layers
ROWS = ((1,), (2, 33), (64,), (3, 700))


def random_inputs(rows, inputs, channels):
    """Float64 arguments, exact in float32."""
    draw = torch.Generator().manual_seed(1)
    shapes = (*rows, inputs), (2 * channels, inputs), (2 * channels,), (*rows, channels)
    return [torch.randn(shape, generator=draw).double() for shape in shapes]


def evaluate(arguments, dtype, backend, p, *, training=True, call=linear_glu_dropout_add):
    """Output and all gradients of a random functional, by name; every evaluation has the same mask."""
    leaves = [t if t is None else t.to(dtype).detach().requires_grad_() for t in arguments]
    torch.manual_seed(5)
    out = call(*leaves, p, training, backend=backend)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    gradients = torch.autograd.grad(out, [t for t in leaves if t is not None], weights)
    names = [name for name, t in zip(NAMES, leaves, strict=True) if t is not None]
    return {"out": out.detach(), **dict(zip(names, gradients, strict=True))}


def compare(arguments, assert_close, p=0.3, dtype=torch.float32, **options):
    oracle = evaluate(arguments, torch.float64, "reference", p)
    results = evaluate(arguments, dtype, "cpp", p, **options)
    assert set(results) == set(oracle)
    for name, expected in oracle.items():
        assert_close(results[name].double(), expected, name, dtype)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inputs", [3, 40])
def test_it_is_the_composition(assert_close, backend, training, inputs):
    arguments = random_inputs((2, 9), inputs, 5)
    dtype = torch.float64 if backend == "reference" else torch.float32

    def composed(x, weight, bias, residual, p, training, backend):
        return glu_dropout_add(F.linear(x, weight, bias), residual, p, training, backend=backend)

    results = evaluate(arguments, dtype, backend, 0.3, training=training)
    for name, expected in evaluate(arguments, dtype, backend, 0.3, training=training, call=composed).items():
        assert_close(results[name].double(), expected.double(), name, dtype)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.usefixtures("poisoned_memory")
def test_cpp(assert_close, cpp_calls, p):
    with cpp_calls() as seen:
        for inputs, channels in SIZES:
            for rows in ROWS:
                compare(random_inputs(rows, inputs, channels), assert_close, p)
    assert seen == dict.fromkeys(("gated_linear", "gated_linear_backward"), len(SIZES) * len(ROWS))


@pytest.mark.parametrize(("inputs", "channels"), [(9, 4), (4, 9), (64, 64)])
def test_wide_layers_take_their_product_from_torch(assert_close, cpp_calls, inputs, channels):
    with cpp_calls() as seen:
        compare(random_inputs((2, 40), inputs, channels), assert_close)
    assert seen == {"glu_dropout_add": 1, "glu_dropout_add_backward": 1}


@pytest.mark.parametrize(("inputs", "channels"), [(8, 8), (5, 3), (2, 7)])
def test_every_instruction_set(assert_close, isa, inputs, channels):
    compare(random_inputs((5, 71), inputs, channels), assert_close)


def test_same_bits_for_any_thread_count():
    arguments = random_inputs((50, 217), 8, 8)
    check_threads(lambda: evaluate(arguments, torch.float32, "cpp", 0.1))


def test_without_a_bias(assert_close):
    x, weight, _, residual = random_inputs((70,), 8, 6)
    compare([x, weight, None, residual], assert_close)


@pytest.mark.parametrize("layout", ["slice", "transposed"])
def test_any_strides(assert_close, layout):
    arguments = random_inputs((3, 70), 6, 8)
    wide = [torch.full((*t.shape[:-1], t.shape[-1] + 3), torch.nan) for t in arguments]
    placed = []
    for t, home in zip(arguments, wide, strict=True):
        if layout == "slice":
            home = home[..., 3:]
        else:
            home = torch.empty(t.shape[::-1]).permute(*reversed(range(t.dim())))
        placed.append(home.copy_(t))
    torch.manual_seed(5)
    out = linear_glu_dropout_add(*placed, 0.3, backend="cpp")
    torch.manual_seed(5)
    assert_close(out.double(), linear_glu_dropout_add(*arguments, 0.3, backend="reference"), "out", torch.float32)


def test_gates_that_are_open_or_shut(assert_close):
    arguments = random_inputs((130,), 8, 8)
    arguments[0] *= 100
    compare(arguments, assert_close)
    assert not evaluate(arguments, torch.float32, "cpp", 0.0)["out"].isnan().any()


def test_a_bad_row_spoils_no_other_and_what_is_dropped_is_dropped():
    arguments = [t.float() for t in random_inputs((200,), 8, 8)]
    clean = linear_glu_dropout_add(*arguments, 0.0)
    arguments[0][7, 2], arguments[0][64, 0] = torch.nan, torch.inf
    spoilt = linear_glu_dropout_add(*arguments, 0.0)
    others = [row for row in range(200) if row not in (7, 64)]
    assert torch.equal(spoilt[others], clean[others])
    assert spoilt[7].isnan().all()
    assert not linear_glu_dropout_add(*arguments, 1.0).isnan().any()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(assert_close, backend, dtype):
    arguments = [t.to(dtype).double() for t in random_inputs((2, 20), 8, 6)]
    oracle = evaluate(arguments, torch.float64, "reference", 0.2)
    results = evaluate(arguments, dtype, backend, 0.2)
    assert {t.dtype for t in results.values()} == {dtype}
    for name, expected in oracle.items():
        assert_close(results[name].double(), expected, name, dtype)


@pytest.mark.parametrize("inputs", [4, 20])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_low_precision_autocast_and_mixed_dtypes(backend, inputs):
    x, weight, bias, residual = (t.float().requires_grad_() for t in random_inputs((9,), inputs, 4))
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_glu_dropout_add(x, weight, bias, residual, 0.0, backend=backend)
    out.sum().backward()
    assert {t.dtype for t in (out, x.grad, weight.grad, bias.grad, residual.grad)} == {torch.float32}
    low = linear_glu_dropout_add(*(t.bfloat16() for t in (x, weight, bias)), residual, 0.0, backend=backend)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, out, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "inputs", "channels"), [((0,), 4, 4), ((3,), 0, 4), ((3,), 4, 0)])
def test_nothing_in(dtype, rows, inputs, channels):
    results = evaluate(random_inputs(rows, inputs, channels), dtype, None, 0.3)
    assert results["out"].shape == (*rows, channels)
    assert results["weight"].shape == (2 * channels, inputs)
    assert not results["weight"].any()


def test_gradient_check():
    arguments = [t.requires_grad_() for t in random_inputs((3,), 4, 2)]
    assert torch.autograd.gradcheck(lambda *t: linear_glu_dropout_add(*t, 0.0), arguments)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_custom_ops_are_well_formed(p):
    seed = torch.tensor(11) if p else None
    x, weight, bias, residual = (t.float() for t in random_inputs((5,), 4, 3))
    forward = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
    torch.library.opcheck(torch.ops.compressm.gated_linear.default, (*leaves, seed, p), test_utils=forward)
    backward = (residual, x, weight, bias, seed, p)
    torch.library.opcheck(torch.ops.compressm.gated_linear_backward.default, backward, test_utils=forward[:2])


def test_compiles_into_one_graph(assert_close):
    compiled = torch.compile(linear_glu_dropout_add, fullgraph=True, backend="aot_eager")
    compare(random_inputs((2, 9), 8, 8), assert_close, call=compiled)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("x", lambda t: t.long()),
        ("x", lambda t: t[0, 0, 0]),
        ("weight", lambda t: t[1:]),
        ("weight", lambda t: t[:, 1:]),
        ("weight", lambda t: t[0]),
        ("weight", lambda t: t.to("meta")),
        ("bias", lambda t: t[1:]),
        ("bias", lambda t: t.to(torch.complex64)),
        ("residual", lambda t: t[..., 1:]),
        ("residual", lambda t: t[:1]),
        ("p", lambda _: 1.5),
        ("p", lambda _: math.nan),
    ],
)
def test_wrong_arguments_are_named(name, wrong):
    x, weight, bias, residual = (t.float() for t in random_inputs((2, 5), 4, 6))
    arguments = {"x": x, "weight": weight, "bias": bias, "residual": residual, "p": 0.1}
    arguments[name] = wrong(arguments[name])
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        linear_glu_dropout_add(**arguments)


def test_backends_that_cannot_run_say_why():
    arguments = random_inputs((2,), 4, 6)
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        linear_glu_dropout_add(*arguments, 0.1, backend="cpp")
    with pytest.raises(BackendError, match="expected one of"):
        linear_glu_dropout_add(*(t.float() for t in arguments), 0.1, backend="triton")
