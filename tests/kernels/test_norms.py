"""Layer and RMS norms: values and gradients against torch's in float64, instruction sets, threads, modules, bad input."""

from __future__ import annotations

import pytest
import torch
from kernels.evaluation import check_threads
from kernels.layouts import lay_out
from torch import nn

from compressm.errors import ArgumentError, BackendError
from compressm.kernels.fused_cpu import layer_norm, layer_norm_mean, rms_norm
from compressm.layers import LayerNorm, RMSNorm

CHANNELS = (2, 3, 8, 15, 16, 31, 32, 33, 64, 129)
ROWS = ((1,), (2, 33), (16, 4))


def random_inputs(*shape):
    """Float64 x with a mean of its own in every row, weight and bias, exact in float32."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=draw) * 2 + torch.randn((*shape[:-1], 1), generator=draw)
    weight, bias = torch.randn((2, shape[-1]), generator=draw)
    return {"x": x.double(), "weight": weight.double(), "bias": bias.double()}


def evaluate(inputs, dtype, backend, *, eps=1e-5, layout="dense", calls=(layer_norm, rms_norm)):
    """Outputs of both norms, the first with and without bias, and all gradients of a random functional, by name."""
    results = {}
    for name, given in (("layer", "x weight bias"), ("layer_no_bias", "x weight"), ("rms", "x weight")):
        leaves = {key: lay_out(inputs[key].to(dtype), layout).requires_grad_() for key in given.split()}
        out = calls[name == "rms"](*leaves.values(), eps=eps, backend=backend)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
        gradients = torch.autograd.grad(out, list(leaves.values()), lay_out(weights, layout))
        results |= {name: out.detach(), **{f"{name}.{key}": g for key, g in zip(leaves, gradients, strict=True)}}
    return results


def check(results, oracle, assert_close, dtype):
    assert set(results) == set(oracle)
    for name, expected in oracle.items():
        assert_close(results[name].double(), expected, name, dtype)


@pytest.mark.parametrize("layout", ["dense", "slice", "transposed"])
@pytest.mark.usefixtures("poisoned_memory")
def test_cpp(assert_close, cpp_calls, layout):
    for channels in CHANNELS:
        for rows in ROWS:
            inputs = random_inputs(*rows, channels)
            oracle = evaluate(inputs, torch.float64, "reference", eps=1e-2)
            results = evaluate(inputs, torch.float32, None, eps=1e-2, layout=layout)
            check(results, oracle, assert_close, torch.float32)
    with cpp_calls() as seen:
        evaluate(inputs, torch.float32, None, layout=layout)
    assert seen == {"norm": 3, "norm_backward": 3}


def evaluate_mean(inputs, dtype, backend, layout="dense"):
    """The mean over time and its gradients by name."""
    leaves = {key: lay_out(t.to(dtype), layout).requires_grad_() for key, t in inputs.items()}
    out = layer_norm_mean(*leaves.values(), eps=1e-2, backend=backend)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    return {"out": out.detach(), **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), weights), strict=True))}


@pytest.mark.parametrize("layout", ["dense", "slice", "transposed"])
@pytest.mark.usefixtures("poisoned_memory")
def test_mean_over_time(assert_close, cpp_calls, layout):
    for channels in CHANNELS:
        for rows in ((1, 1), (3, 37), (2, 2, 1100)):
            inputs = random_inputs(*rows, channels)
            oracle = evaluate_mean(inputs, torch.float64, "reference")
            with cpp_calls() as seen:
                results = evaluate_mean(inputs, torch.float32, None, layout)
            assert seen == {"norm_mean": 1, "norm_mean_backward": 1}
            check(results, oracle, assert_close, torch.float32)


@pytest.mark.parametrize("channels", [7, 16, 41, 64])
def test_mean_on_every_instruction_set(assert_close, isa, channels):
    inputs = random_inputs(5, 70, channels)
    oracle = evaluate_mean(inputs, torch.float64, "reference")
    check(evaluate_mean(inputs, torch.float32, "cpp"), oracle, assert_close, torch.float32)


@pytest.mark.parametrize("channels", [8, 33])
def test_a_gradient_that_all_rows_share(assert_close, channels):
    inputs = random_inputs(3, 70, channels)
    shared = torch.randn(3, 1, channels, generator=torch.Generator().manual_seed(5)).double()
    results = {}
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "cpp")):
        leaves = {key: t.to(dtype).requires_grad_() for key, t in inputs.items()}
        out = layer_norm(*leaves.values(), backend=backend)
        grads = torch.autograd.grad(out, list(leaves.values()), shared.to(dtype).expand_as(out))
        results[dtype] = dict(zip(leaves, grads, strict=True))
    check(results[torch.float32], results[torch.float64], assert_close, torch.float32)


@pytest.mark.parametrize("channels", [7, 16, 41, 64])
def test_every_instruction_set(assert_close, isa, channels):
    inputs = random_inputs(5, 19, channels)
    oracle = evaluate(inputs, torch.float64, "reference")
    check(evaluate(inputs, torch.float32, "cpp"), oracle, assert_close, torch.float32)


@pytest.mark.parametrize("channels", [8, 33])
def test_same_bits_for_any_thread_count(channels):
    inputs = random_inputs(50, 157, channels)
    check_threads(lambda: evaluate(inputs, torch.float32, "cpp"))


@pytest.mark.parametrize("channels", [8, 64])
def test_rows_far_from_zero_and_rows_that_are_constant(assert_close, channels):
    inputs = random_inputs(7, channels)
    inputs["x"] = (inputs["x"] + 1000).float().double()
    inputs["x"][3] = -5.0
    oracle = evaluate(inputs, torch.float64, "reference")
    results = evaluate(inputs, torch.float32, "cpp")
    constant = "layer", "layer.x", "layer_no_bias", "layer_no_bias.x"
    for name in constant:
        torch.testing.assert_close(results[name].double(), oracle[name], rtol=1e-3, atol=1e-3)
    for name in set(oracle) - set(constant):
        torch.testing.assert_close(results[name].double(), oracle[name], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("channels", [8, 64])
def test_one_bad_row_spoils_no_other(channels):
    inputs = random_inputs(20, channels)
    clean = evaluate(inputs, torch.float32, "cpp")
    inputs["x"][3, 1], inputs["x"][11, 0] = torch.nan, torch.inf
    spoilt = evaluate(inputs, torch.float32, "cpp")
    others = [row for row in range(20) if row not in (3, 11)]
    for name in ("layer", "layer.x", "rms", "rms.x"):
        assert torch.equal(spoilt[name][others], clean[name][others]), name
        assert spoilt[name][[3, 11]].isnan().any(-1).all(), name


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(assert_close, backend, dtype):
    inputs = {name: t.to(dtype).double() for name, t in random_inputs(2, 20, 65).items()}
    oracle = evaluate(inputs, torch.float64, "reference")
    results = evaluate(inputs, dtype, backend)
    assert {t.dtype for t in results.values()} == {dtype}
    check(results, oracle, assert_close, dtype)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_half_precision_rows_with_float32_weights(backend):
    x = torch.randn(3, 8, dtype=torch.bfloat16).requires_grad_()
    weight, bias = torch.randn(8).requires_grad_(), torch.randn(8).requires_grad_()
    out = layer_norm(x, weight, bias, backend=backend)
    out.float().sum().backward()
    assert (out.dtype, x.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert weight.grad.dtype == bias.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_in_nothing_out(dtype, shape):
    results = evaluate(random_inputs(*shape), dtype, None)
    assert results["layer"].shape == results["rms.x"].shape == shape
    assert not results["layer.weight"].any()


def test_one_channel():
    inputs = random_inputs(40, 1)
    oracle, results = (evaluate(inputs, dtype, None) for dtype in (torch.float64, torch.float32))
    for name, expected in oracle.items():  # x's gradients nearly vanish: a difference of terms as large as 1 / sqrt(eps)
        torch.testing.assert_close(results[name].double(), expected, rtol=1e-5, atol=1e-4)


def test_a_single_row():
    assert layer_norm(torch.randn(5), torch.ones(5)).shape == (5,)
    torch.testing.assert_close(rms_norm(torch.tensor([3.0]), torch.tensor([2.0])), torch.tensor([2.0]))


def test_gradient_check():
    inputs = [t.requires_grad_() for t in random_inputs(3, 5).values()]
    assert torch.autograd.gradcheck(layer_norm, inputs)
    assert torch.autograd.gradcheck(rms_norm, inputs[:2])


@pytest.mark.parametrize("centred", [True, False])
def test_custom_ops_are_well_formed(centred):
    ops = torch.ops.compressm
    x, weight, bias, grad = torch.randn(3, 9), torch.randn(9), torch.randn(9), torch.randn(3, 9)
    forward = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    arguments = (*leaves[:2], leaves[2] if centred else None, 1e-5, centred)
    torch.library.opcheck(ops.norm.default, arguments, test_utils=forward)
    torch.library.opcheck(ops.norm_backward.default, (grad, x, weight, 1e-5, centred), test_utils=forward[:2])


def test_compiles_into_one_graph(assert_close):
    inputs = random_inputs(2, 5, 8)
    compiled = [torch.compile(f, fullgraph=True, backend="aot_eager") for f in (layer_norm, rms_norm)]
    oracle = evaluate(inputs, torch.float64, "reference")
    check(evaluate(inputs, torch.float32, None, calls=compiled), oracle, assert_close, torch.float32)


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_modules_are_those_of_torch(assert_close, dtype, eps):
    settings = [{"eps": 1e-5 if eps is None else eps}, {"eps": eps}, {"eps": 1e-4, "elementwise_affine": False}]
    kinds = [(LayerNorm, nn.LayerNorm), (RMSNorm, nn.RMSNorm)]
    pairs = [(ours(6, **settings[k]), theirs(6, **settings[k])) for k, (ours, theirs) in enumerate(kinds)]
    pairs += [(ours(6, **settings[2]), theirs(6, **settings[2])) for ours, theirs in kinds]
    pairs += [(ours((4, 6)), theirs((4, 6))) for ours, theirs in kinds]
    pairs.append((LayerNorm(6, bias=False), nn.LayerNorm(6, bias=False)))
    for ours, theirs in pairs:
        for parameter in theirs.parameters():
            nn.init.normal_(parameter)
        ours.load_state_dict(theirs.state_dict())
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        x = (1e-2 * torch.randn(3, 4, 6)).to(dtype)
        assert_close(ours(x).double(), theirs(x).double(), repr(ours), dtype)


def test_modules_under_autocast(assert_close):
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in ((LayerNorm(8), nn.LayerNorm(8)), (RMSNorm(8), nn.RMSNorm(8))):
            out, expected = ours(x), theirs(x)
            assert out.dtype == expected.dtype == torch.float32
            assert_close(out.double(), expected.double(), repr(ours), torch.float32)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("x", lambda t: t.long()),
        ("x", lambda t: t[0, 0, 0]),
        ("x", lambda t: t.to(torch.complex64)),
        ("weight", lambda t: t[1:]),
        ("weight", lambda t: t[None]),
        ("weight", lambda t: t.long()),
        ("bias", lambda t: t[1:]),
        ("bias", lambda t: t.to("meta")),
    ],
)
def test_wrong_arguments_are_named(name, wrong):
    arguments = {"x": torch.randn(2, 5, 6), "weight": torch.randn(6), "bias": torch.randn(6)}
    arguments[name] = wrong(arguments[name])
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        layer_norm(**arguments)
    if name != "bias":
        del arguments["bias"]
        with pytest.raises(ArgumentError, match=f"^{name}: expected"):
            rms_norm(**arguments)


def test_backends_that_cannot_run_say_why():
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        layer_norm(torch.randn(3, dtype=torch.float64), torch.ones(3), backend="cpp")
    with pytest.raises(BackendError, match="expected one of"):
        rms_norm(torch.randn(3), torch.ones(3), backend="triton")
