"""Mamba-2's scan in C++ against the float64 reference: outputs, all gradients, layouts, packing, instruction sets."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.evaluation import check, check_inductor, check_threads
from kernels.layouts import lay_out
from kernels.ssd_cases import GOLDEN, TENSORS, evaluate, numbered, random_inputs

from compressm.errors import BackendError
from compressm.kernels import plan, ssd
from compressm.kernels.core import cpp
from compressm.kernels.ssd.op import ssd_op


def compare(inputs, assert_close, dtype=torch.float32, **options):
    """Outputs and gradients of the C++ scan and of the float64 reference agree."""
    oracle = evaluate(inputs, torch.float64, "reference", **options)
    check(evaluate(inputs, dtype, "cpp", **options), oracle, assert_close, dtype)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(golden, name):
    g = golden(name)
    leaves = {key: g[key].float().requires_grad_() for key in TENSORS}
    limits = tuple(g["dt_limit"].tolist())
    out, last = ssd(**leaves, dt_softplus=True, dt_limit=limits, return_final_states=True, backend="cpp")
    gradients = torch.autograd.grad((out, last), list(leaves.values()), (g["w"].float(), g["w_state"].float()))
    for key, value in (("out", out), ("last_state", last)):
        assert (value.detach() - g[key]).norm() <= 2e-6 * g[key].norm(), key
    for key, gradient in zip(leaves, gradients, strict=True):
        assert (gradient - g[f"grad_{key}"]).norm() <= 1e-5 * g[f"grad_{key}"].norm(), key


@pytest.mark.parametrize("states", [1, 5, 12, 13, 100, 128, 300])
@pytest.mark.parametrize("length", [1, 33, 70])
@pytest.mark.usefixtures("poisoned_memory")
def test_any_number_of_states(assert_close, states, length):
    compare(random_inputs(2, length, 4, 7, 2, states), assert_close)


@pytest.mark.parametrize("channels", [1, 4, 16, 17, 33, 64, 80])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 3), (6, 2)])
@pytest.mark.usefixtures("poisoned_memory")
def test_any_number_of_channels_heads_and_groups(assert_close, channels, heads, groups):
    compare(random_inputs(2, 41, heads, channels, groups, 6), assert_close)


@pytest.mark.parametrize("chunk", [1, 7, 16, 48, 100, 300])
@pytest.mark.usefixtures("poisoned_memory")
def test_any_chunk_on_every_instruction_set(assert_close, chunk, isa):
    assert cpp.library().isa() == isa
    compare(random_inputs(1, 137, 4, 19, 2, 11), assert_close, chunk_size=chunk)


@pytest.mark.usefixtures("poisoned_memory")
def test_decays_of_all_sizes_on_every_instruction_set(assert_close, isa):
    inputs = random_inputs(2, 130, 4, 5, 1, 9, without=["dt_bias"])
    inputs["A"] = -torch.tensor([1e-4, 1.0, 30.0, 4000.0], dtype=torch.float64)
    oracle = evaluate(inputs, torch.float64, "reference", chunk_size=64)
    results = evaluate(inputs, torch.float32, "cpp", chunk_size=64)
    for name in ("A", "dt"):  # of each head by itself
        for head in range(3):
            assert_close(results[name][..., head].double(), oracle[name][..., head], f"{name} {head}", torch.float32)
    check(results, oracle, assert_close, torch.float32)


@pytest.mark.parametrize("without", ["", "D", "z", "dt_bias", "initial_states", "D z dt_bias initial_states"])
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.usefixtures("poisoned_memory")
def test_optional_arguments(assert_close, without, softplus):
    inputs = random_inputs(2, 70, 4, 5, 2, 4, without=without.split(), wide_skip=softplus)
    compare(inputs, assert_close, dt_softplus=softplus)
    compare(inputs, assert_close, dt_softplus=softplus, dt_limit=(0.05, 0.5))


def test_step_sizes_keep_their_digits():
    dt = torch.logspace(-8, 2, 700, dtype=torch.float64)
    given = torch.where(dt < 10, dt.expm1().log(), dt)[None, :, None].float()
    exact = torch.nn.functional.softplus(given.double(), threshold=1e9)
    ones = torch.ones(1, 700, 1, 1)
    out = ssd(ones, given, torch.full((1,), -1e9), ones, ones, dt_softplus=True, backend="cpp")[..., 0]
    forgotten = exact > 1e-6  # exp(-1e9 step) = 0: the output is the step itself
    assert ((out - exact).abs() / exact)[forgotten].max() < 4e-7


@pytest.mark.parametrize("layout", ["slice", "transposed", "strided", "expanded", "projected"])
@pytest.mark.usefixtures("poisoned_memory")
def test_layouts(assert_close, layout):
    inputs = random_inputs(2, 37, 4, 6, 2, 5)
    if layout == "expanded":
        for name, axis in (("x", 3), ("B", 0), ("C", 3), ("z", 1), ("dt", 2)):
            inputs[name] = inputs[name].narrow(axis, 0, 1).expand(inputs[name].shape)
        laid = {name: t.float() if 0 not in t.stride() else _narrow(t).float().expand(t.shape) for name, t in inputs.items()}
    elif layout == "strided":
        laid = {name: t.float().repeat_interleave(2, -1)[..., ::2] for name, t in inputs.items()}
    elif layout == "projected":  # as a layer's projection leaves them
        parts = [inputs[name].flatten(2) for name in ("z", "x", "B", "C", "dt")]
        pieces = torch.cat(parts, -1).float().split([t.shape[-1] for t in parts], -1)
        laid = {name: t.float() for name, t in inputs.items()}
        laid |= {
            name: t.unflatten(-1, inputs[name].shape[2:]) for name, t in zip(("z", "x", "B", "C", "dt"), pieces, strict=True)
        }
        assert not laid["x"].is_contiguous()
    else:
        laid = {name: lay_out(t.float(), layout) for name, t in inputs.items()}
    check(evaluate(laid, None, "cpp"), evaluate(inputs, torch.float64, "reference"), assert_close, torch.float32)


def _narrow(t):
    for axis, stride in enumerate(t.stride()):
        t = t.narrow(axis, 0, 1) if stride == 0 else t
    return t


@pytest.mark.parametrize("given", [(0,), (1,)], ids=["out", "final states"])
@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.usefixtures("poisoned_memory")
def test_one_gradient_comes_in(assert_close, given, expanded):
    inputs = random_inputs(2, 70, 2, 5, 1, 4)
    found = []
    for dtype, backend in ((torch.float32, "cpp"), (torch.float64, "reference")):
        leaves = {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}
        outputs = ssd(**leaves, dt_softplus=True, return_final_states=True, backend=backend)
        wanted = [outputs[k] for k in given]
        loss = wanted[0].sum() if expanded else (wanted[0] * torch.linspace(0, 1, wanted[0].shape[-1], dtype=dtype)).sum()
        found.append(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True))
    for name, actual, expected in zip(inputs, *found, strict=True):
        assert_close(actual, expected, name)


BOUNDS = [[0, 7, 7, 40, 104, 137], [0, 0, 33, 33], [0, 200, 201, 202], list(range(0, 61, 3))]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.usefixtures("poisoned_memory")
def test_packed_sequences(assert_close, bounds, integer):
    inputs = random_inputs(1, bounds[-1], 4, 5, 2, 3, sequences=len(bounds) - 1)
    compare(inputs, assert_close, cu_seqlens=torch.tensor(bounds, dtype=integer))
    inputs["initial_states"] = None
    compare(inputs, assert_close, cu_seqlens=torch.tensor(bounds, dtype=integer), chunk_size=16)


@pytest.mark.parametrize("starts", [([0, 5, 6, 17], [3]), ([64], [8, 16, 24]), ([], range(70)), ([69], [1, 38])], ids=str)
@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.usefixtures("poisoned_memory")
def test_numbered_sequences(assert_close, starts, chunk):
    inputs = random_inputs(2, 70, 2, 5, 1, 3)
    compare(inputs, assert_close, seq_idx=numbered(70, *starts), chunk_size=chunk)
    inputs["initial_states"] = None
    compare(inputs, assert_close, seq_idx=numbered(70, *starts).long(), chunk_size=chunk)


SETTINGS = (True, 0.0, math.inf, True, 1.0, 0, "cpp")


@pytest.mark.parametrize("bounds", [[0, 9, 4, 12], [0, 13], [-3, 12], [1, 12], [0, 1 << 40, 12]], ids=str)
def test_the_kernel_itself_refuses_wrong_bounds(bounds):
    names = random_inputs(1, 12, without=["initial_states"])
    arguments = [None if t is None else t.float() for t in names.values()]
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        ssd_op(*arguments, None, torch.tensor(bounds), *SETTINGS)


def test_the_kernel_itself_refuses_wrong_shapes():
    arguments = [t.float() for t in random_inputs(2, 12, 4, 3, 2, 5).values()]
    for position in range(len(arguments)):
        wrong = list(arguments)
        wrong[position] = arguments[position][1:] if arguments[position].dim() == 1 else arguments[position][..., 1:]
        with pytest.raises(RuntimeError, match="expected a float32 CPU tensor of shape"):
            ssd_op(*wrong, None, None, *SETTINGS)
    with pytest.raises(RuntimeError, match="seq_idx"):
        ssd_op(*arguments, torch.zeros(2, 11, dtype=torch.int32), None, *SETTINGS)
    with pytest.raises(RuntimeError, match="chunk"):
        ssd_op(*arguments, None, None, True, 0.0, math.inf, True, 1.0, -1, "cpp")


@pytest.mark.parametrize("sizes", [(1, 300, 3, 16, 1, 20), (2, 70, 8, 5, 4, 40), (9, 40, 2, 7, 1, 5)], ids=str)
def test_the_same_bits_for_any_number_of_threads(sizes):
    inputs = random_inputs(*sizes)
    check_threads(lambda: evaluate(inputs, torch.float32, "cpp"))


@pytest.mark.parametrize("bounds", [[0, 137], [0, 40, 75, 75, 137]], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_whole_sequences_in_one_thread_have_the_bits_of_chunks_in_many(bounds, isa):
    assert cpp.library().isa() == isa
    inputs = random_inputs(1, 137, 4, 19, 2, 11, sequences=len(bounds) - 1)
    packed, numbers = torch.tensor(bounds), numbered(137, bounds[1:-1])
    check_threads(lambda: evaluate(inputs, torch.float32, "cpp", cu_seqlens=packed, chunk_size=16))
    inputs["initial_states"] = inputs["initial_states"][:1]
    check_threads(lambda: evaluate(inputs, torch.float32, "cpp", seq_idx=numbers, chunk_size=16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(assert_close, dtype):
    inputs = random_inputs(2, 65, 4, 7, 2, 9)
    for name in ("x", "dt", "B", "C", "z"):
        inputs[name] = inputs[name].to(dtype).double()
    results = evaluate(inputs, dtype, "cpp")
    assert results["out"].dtype == dtype
    assert results["last"].dtype == torch.float32
    oracle = evaluate(inputs, torch.float64, "reference")
    check(results, oracle, assert_close, dtype)
    assert_close(results["last"], oracle["last"], "last", torch.float32)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 9, 33])
def test_parameters_of_few_steps_in_half_precision_have_gradients_of_float32(assert_close, length):
    inputs = random_inputs(2, length, 4, 7, 2, 9)
    inputs |= {name: inputs[name].bfloat16().double() for name in ("x", "dt", "B", "C", "z")}
    weight, found = torch.linspace(-1, 1, 7).bfloat16(), []
    for dtype, backend in ((torch.bfloat16, "cpp"), (torch.float64, "reference")):
        leaves = {name: t.to(torch.promote_types(dtype, torch.float32)) for name, t in inputs.items()}
        leaves |= {name: inputs[name].to(dtype) for name in ("x", "dt", "B", "C", "z")}
        parameters = [leaves[name].requires_grad_() for name in ("A", "D", "dt_bias")]
        out = ssd(**leaves, dt_softplus=True, backend=backend)
        found.append(torch.autograd.grad(out, parameters, weight.to(dtype).expand(out.shape)))
    for name, actual, expected in zip(("A", "D", "dt_bias"), *found, strict=True):
        assert_close(actual.double(), expected, name, torch.float32)


def test_what_the_backward_keeps_is_the_arguments():
    leaves = {k: t.float().requires_grad_() for k, t in random_inputs(2, 200, 4, 16, 1, 30).items()}
    own, kept = {t.data_ptr() for t in leaves.values()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = ssd(**leaves, dt_softplus=True, backend="cpp")
    assert out.requires_grad
    assert set(kept) == own


def test_it_is_what_a_cpu_runs(cpp_calls):
    shapes = {"x": (2, 33, 4, 3), "B": (2, 33, 2, 5)}
    assert plan("ssd", shapes).backend == "cpp"
    assert plan("ssd", shapes, torch.float64).backend == "reference"
    leaves = {k: t.float().requires_grad_() for k, t in random_inputs().items()}
    with cpp_calls() as seen:
        out = ssd(**leaves, dt_softplus=True)
        out.sum().backward()
    assert seen == {"ssd": 1, "ssd_backward": 1}
    assert torch.equal(out, ssd(**leaves, dt_softplus=True, backend="cpp"))
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        ssd(**random_inputs(), backend="cpp")


@pytest.mark.parametrize("packed", [False, True])
def test_custom_op_is_well_formed(packed):
    inputs = random_inputs(1, 70, 4, 3, 2, 5, sequences=3 if packed else 1)
    arguments = [t.float().requires_grad_() for t in inputs.values()]
    bounds = torch.tensor([0, 3, 3, 70]) if packed else None
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    torch.library.opcheck(ssd_op.op, (*arguments, None, bounds, *SETTINGS), test_utils=tests)
    arguments = [None if name in ("D", "z") else t for name, t in zip(TENSORS, arguments, strict=True)]
    numbers = None if packed else numbered(70, [5, 30])
    torch.library.opcheck(ssd_op.op, (*arguments, numbers, bounds, *SETTINGS), test_utils=tests)


@pytest.mark.slow
def test_compiles_with_inductor(assert_close):
    inputs = random_inputs(1, 40, 4, 3, 2, 5, sequences=3)
    options = {"cu_seqlens": torch.tensor([0, 13, 13, 40]), "dt_softplus": True, "return_final_states": True}
    check_inductor(ssd, inputs, assert_close, **options)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_random_sizes(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    groups = draw(1, 3)
    sizes = draw(1, 3), draw(1, 80), groups * draw(1, 3), draw(1, 20), groups, draw(1, 20)
    inputs = random_inputs(*sizes, seed=draw(0, 99))
    oracle = evaluate(inputs, torch.float64, "reference")
    for name, value in evaluate(inputs, torch.float32, "cpp", chunk_size=draw(1, 90)).items():
        rounding = 1e-6 * value.numel() ** 0.5  # where the terms of a sum, of order 1, cancel
        assert (value - oracle[name]).norm() <= 2e-5 * oracle[name].norm() + rounding, name
