"""GELU and the gated linear unit with their dropout: values and gradients under one mask, the masks themselves, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from kernels.evaluation import check_threads
from kernels.layouts import lay_out
from torch.nn import functional as F

from compressm.errors import ArgumentError, BackendError
from compressm.kernels.fused_cpu import gates_reference, gelu_dropout, glu_dropout_add

CHANNELS, PROBABILITIES = (1, 3, 8, 33, 257), (0.0, 0.1, 0.5, 1.0)


def random_inputs(*shape):
    """Float64 x, pre and residual, exact in float32, values to either side of where the tails end."""
    draw = torch.Generator().manual_seed(1)
    *rows, channels = shape
    sizes = {"x": shape, "pre": (*rows, 2 * channels), "residual": shape}
    return {name: 3 * torch.randn(size, generator=draw).double() for name, size in sizes.items()}


def evaluate(inputs, dtype, backend, p, *, training=True, layout="dense", calls=(gelu_dropout, glu_dropout_add)):
    """Both outputs and all gradients of a random functional of them, by name; every evaluation has the same masks."""
    leaves = {name: lay_out(t.to(dtype), layout).requires_grad_() for name, t in inputs.items()}
    torch.manual_seed(5)
    outs = {
        "gelu": calls[0](leaves["x"], p, training, backend=backend),
        "glu": calls[1](leaves["pre"], leaves["residual"], p, training, backend=backend),
    }
    draw = torch.Generator().manual_seed(7)
    loss = sum((lay_out(torch.randn(t.shape, generator=draw).to(dtype), layout) * t).sum() for t in outs.values())
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    results = {**outs, **dict(zip(leaves, gradients, strict=True))}
    return {name: tensor.detach() for name, tensor in results.items()}


def check(results, oracle, assert_close, dtype):
    assert set(results) == set(oracle)
    for name, expected in oracle.items():
        assert_close(results[name].double(), expected, name, dtype)


def kept(shape, p, seed=0, backend=None):
    """The mask of a call after ``torch.manual_seed(seed)``, as float64 ones and zeros."""
    torch.manual_seed(seed)
    return (gelu_dropout(torch.full(shape, 2.0), p, backend=backend) != 0).double()


@pytest.mark.parametrize("training", [True, False])
def test_reference_is_the_composition(assert_close, training):
    inputs = random_inputs(2, 9, 5)
    results = evaluate(inputs, torch.float64, "reference", 0.3, training=training)
    torch.manual_seed(5)
    masks = [gates_reference.keep_mask(torch.randint(2**63 - 1, ()), 0.3, 90).view(2, 9, 5).double() / 0.7 for _ in range(2)]
    masks = masks if training else [1, 1]
    a, b = inputs["pre"].chunk(2, -1)
    assert_close(results["gelu"], F.gelu(inputs["x"]) * masks[0])
    assert_close(results["glu"], inputs["residual"] + a * torch.sigmoid(b) * masks[1])


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("layout", ["dense", "slice", "transposed"])
@pytest.mark.usefixtures("poisoned_memory")
def test_cpp(assert_close, cpp_calls, p, layout):
    for channels in CHANNELS:
        for rows in ((1,), (2, 33), (16, 4)):
            inputs = random_inputs(*rows, channels)
            oracle = evaluate(inputs, torch.float64, "reference", p)
            check(evaluate(inputs, torch.float32, None, p, layout=layout), oracle, assert_close, torch.float32)
    with cpp_calls() as seen:
        evaluate(inputs, torch.float32, None, p, layout=layout)
    assert seen == {name: 1 for op in ("gelu_dropout", "glu_dropout_add") for name in (op, f"{op}_backward")}


@pytest.mark.usefixtures("poisoned_memory")
def test_without_training_nothing_is_drawn_or_dropped(assert_close):
    inputs = random_inputs(3, 41, 8)
    oracle = evaluate(inputs, torch.float64, "reference", 0.0)
    check(evaluate(inputs, torch.float32, "cpp", 0.6, training=False), oracle, assert_close, torch.float32)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), after)


@pytest.mark.parametrize("channels", [7, 16, 24])
def test_every_instruction_set(assert_close, isa, channels):
    inputs = random_inputs(5, 19, channels)
    oracle = evaluate(inputs, torch.float64, "reference", 0.25)
    check(evaluate(inputs, torch.float32, "cpp", 0.25), oracle, assert_close, torch.float32)


@pytest.mark.parametrize("channels", [8, 33])
def test_same_bits_for_any_thread_count(channels):
    inputs = random_inputs(50, 157, channels)
    check_threads(lambda: evaluate(inputs, torch.float32, "cpp", 0.1))


def test_gelu_is_exact_to_float32():
    x = torch.linspace(-9, 9, 400_001).requires_grad_()
    wide = x.detach().double().requires_grad_()
    out, exact = gelu_dropout(x, 0.0, backend="cpp"), F.gelu(wide)
    (grad,), (expected,) = torch.autograd.grad(out.sum(), x), torch.autograd.grad(exact.sum(), wide)
    out, exact, wide = out.detach().double(), exact.detach(), wide.detach()
    assert float((out - exact).abs().max()) < 3e-7
    assert float((grad.double() - expected).abs().max()) < 3e-7
    erf = -1 - 2 * out / wide.abs()  # of -|x| / sqrt(2), where x is negative
    error = (erf - torch.erf(-wide.abs() / math.sqrt(2)))[wide < 0]
    assert float(error.abs().max()) < 2e-7


def test_extremes():
    x = torch.tensor([-torch.inf, -1e30, -200.0, 0.0, 200.0, 1e30, torch.inf, torch.nan]).requires_grad_()
    out = gelu_dropout(x, 0.0, backend="cpp")
    torch.testing.assert_close(out, F.relu(x), equal_nan=True, rtol=0, atol=1e-8)
    (grad,) = torch.autograd.grad(out.sum(), x)
    expected = torch.tensor([0, 0, 0, 0.5, 1, 1, 1, torch.nan])
    torch.testing.assert_close(grad, expected, equal_nan=True, rtol=0, atol=1e-7)
    pre = torch.cat([torch.ones(8), x.detach()]).requires_grad_()
    out = glu_dropout_add(pre, torch.zeros(8), 0.0, backend="cpp")
    torch.testing.assert_close(out, torch.sigmoid(x), equal_nan=True, rtol=0, atol=1e-7)
    (grad,) = torch.autograd.grad(out.sum(), pre)
    expected = torch.cat([torch.sigmoid(x), torch.tensor([0, 0, 0, 0.25, 0, 0, 0, torch.nan])])
    torch.testing.assert_close(grad, expected, equal_nan=True, rtol=0, atol=1e-7)


def test_generator_gives_the_published_words():
    words = [(0, 0, 0, 0), (2**32 - 1,) * 4, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    expected = [(0x9D1C5EC6, 0x8BD50731), (0xFD36D048, 0x2D17272C), (0xBA3E4725, 0xF27D669E)]  # Random123's kat_vectors
    for (c0, c1, k0, k1), answer in zip(words, expected, strict=True):
        counter, key = torch.tensor([c0, c1, k0, k1], dtype=torch.uint32).view(torch.int64)
        assert tuple(map(int, gates_reference.threefry(key, counter))) == answer


@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
def test_a_share_p_is_zero(p):
    n = 1_000_003
    zeros = n - float(kept((n,), p).sum())
    assert abs(zeros - p * n) < 5 * math.sqrt(n * p * (1 - p))
    out = glu_dropout_add(torch.ones(2 * n), torch.zeros(n), p)
    assert torch.allclose(out[out != 0], 1 / (1 + torch.tensor(-1.0).exp()) / (1 - p))


def test_masks_are_independent_over_elements_and_seeds():
    n = 1_000_000
    mask = kept((n,), 0.5) - 0.5
    bound = 5 * 0.25 / math.sqrt(n)
    for lag in (1, 2, 3, 4, 8, 15, 16, 17, 32, 48, 63, 64, 65, 1024, 4096):
        assert abs(float((mask[lag:] * mask[:-lag]).sum())) / n < bound, lag
    for seed in (1, 2, 3, 2**31):
        assert abs(float((mask * (kept((n,), 0.5, seed) - 0.5)).mean())) < bound, seed
    counts = mask.view(-1, 64).sum(1)
    assert abs(float(counts.var()) - 16) < 5 * 16 * math.sqrt(2 / len(counts))
    places = mask.view(-1, 64).mean(0) * math.sqrt(len(counts)) / 0.5
    assert float(places.abs().max()) < 5
    assert torch.equal(mask, kept((n,), 0.5, backend="reference") - 0.5)


def test_neighbouring_keys_and_counters_beyond_32_bits_give_other_masks():
    seeds = [torch.tensor(seed) for seed in (0, 1, 2, 2**32, 2**32 + 1, 2**62)]
    masks = torch.stack([gates_reference.keep_mask(seed, 0.5, 64_000) for seed in seeds]).double() - 0.5
    products = masks @ masks.T / 64_000 - 0.25 * torch.eye(len(seeds))
    assert float(products.abs().max()) < 5 * 0.25 / math.sqrt(64_000)
    counter = torch.arange(5)
    first, later = (gates_reference.threefry(seeds[0], c)[0] for c in (counter, counter + 2**32))
    assert not torch.equal(first, later)


def test_seed_governs_and_calls_differ():
    x = torch.randn(7, 9)
    torch.manual_seed(3)
    first, second = gelu_dropout(x, 0.4), gelu_dropout(x, 0.4)
    state = torch.get_rng_state()
    third = gelu_dropout(x, 0.4)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(gelu_dropout(x, 0.4), first)
    torch.set_rng_state(state)
    assert torch.equal(gelu_dropout(x, 0.4), third)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(assert_close, backend, dtype):
    inputs = {name: t.to(dtype).double() for name, t in random_inputs(2, 20, 65).items()}
    oracle = evaluate(inputs, torch.float64, "reference", 0.2)
    results = evaluate(inputs, dtype, backend, 0.2)
    assert {t.dtype for t in results.values()} == {dtype}
    check(results, oracle, assert_close, dtype)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_mixed_dtypes_are_promoted(backend):
    pre, residual = torch.randn(3, 8, dtype=torch.bfloat16).requires_grad_(), torch.randn(3, 4).requires_grad_()
    out = glu_dropout_add(pre, residual, 0.0, backend=backend)
    out.sum().backward()
    assert (out.dtype, pre.grad.dtype, residual.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)


def test_residual_gradient_is_not_copied():
    residual = torch.randn(4, 8, requires_grad=True)
    grad = torch.randn(4, 8)
    (found,) = torch.autograd.grad(glu_dropout_add(torch.randn(4, 16), residual, 0.5), residual, grad)
    assert found.data_ptr() == grad.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_in_nothing_out(dtype, shape):
    results = evaluate(random_inputs(*shape), dtype, None, 0.3)
    assert results["gelu"].shape == results["glu"].shape == results["x"].shape == shape


def test_a_single_vector():
    assert glu_dropout_add(torch.ones(2), torch.ones(1), 0.0).shape == (1,)
    assert gelu_dropout(torch.tensor(1.0), 0.0).shape == ()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_custom_ops_are_well_formed(p):
    ops = torch.ops.compressm
    seed = torch.tensor(11) if p else None
    x, pre, grad = torch.randn(3, 9), torch.randn(3, 18), torch.randn(3, 9)
    forward = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    leaf, residual = x.clone().requires_grad_(), grad.clone().requires_grad_()
    torch.library.opcheck(ops.gelu_dropout.default, (leaf, seed, p), test_utils=forward)
    torch.library.opcheck(ops.glu_dropout_add.default, (pre.clone().requires_grad_(), residual, seed, p), test_utils=forward)
    backward = forward[:2]
    torch.library.opcheck(ops.gelu_dropout_backward.default, (grad, x, seed, p), test_utils=backward)
    torch.library.opcheck(ops.glu_dropout_add_backward.default, (grad, pre, seed, p), test_utils=backward)


def test_compiles_into_one_graph_and_draws_at_every_call(assert_close):
    inputs = random_inputs(2, 5, 8)
    compiled = [torch.compile(f, fullgraph=True, backend="aot_eager") for f in (gelu_dropout, glu_dropout_add)]
    oracle = evaluate(inputs, torch.float64, "reference", 0.3)
    check(evaluate(inputs, torch.float32, None, 0.3, calls=compiled), oracle, assert_close, torch.float32)
    x = torch.randn(40, 40)
    assert not torch.equal(compiled[0](x, 0.3), compiled[0](x, 0.3))


@pytest.mark.slow
def test_inductor_draws_at_every_call():
    compiled = torch.compile(gelu_dropout, fullgraph=True)
    x = torch.full((100, 100), 2.0, requires_grad=True)
    outs = [compiled(x, 0.3) for _ in range(2)]
    assert not torch.equal(*outs)
    for out in outs:
        assert 0.25 < float((out == 0).double().mean()) < 0.35
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(grad == 0, out == 0)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("pre", lambda t: t.long()),
        ("pre", lambda t: t[..., 1:]),
        ("pre", lambda t: t[0, 0, 0]),
        ("residual", lambda t: t[..., 1:]),
        ("residual", lambda t: t[:1]),
        ("residual", lambda t: t.to(torch.complex64)),
        ("residual", lambda t: t.to("meta")),
        ("p", lambda _: -0.1),
        ("p", lambda _: 1.5),
        ("p", lambda _: math.nan),
    ],
)
def test_wrong_arguments_are_named(name, wrong):
    arguments = {"pre": torch.randn(2, 5, 12), "residual": torch.randn(2, 5, 6), "p": 0.1}
    arguments[name] = wrong(arguments[name])
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        glu_dropout_add(**arguments)


@pytest.mark.parametrize(("name", "value"), [("x", torch.arange(3)), ("p", 2.0)])
def test_wrong_arguments_of_gelu_are_named(name, value):
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        gelu_dropout(**{"x": torch.randn(3), "p": 0.1, name: value})


def test_backends_that_cannot_run_say_why():
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        gelu_dropout(torch.randn(3, dtype=torch.float64), 0.1, backend="cpp")
    with pytest.raises(BackendError, match="expected one of"):
        gelu_dropout(torch.randn(3), 0.1, backend="triton")
