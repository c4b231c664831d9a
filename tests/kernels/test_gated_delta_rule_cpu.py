"""The gated delta rule in C++ against the float64 reference: outputs, all gradients, layouts, packing, instruction sets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.evaluation import check, check_inductor, check_threads
from kernels.gated_delta_rule_cases import GOLDEN, TENSORS, evaluate, mixed_decays, random_inputs
from kernels.layouts import lay_out

from compressm.errors import BackendError
from compressm.kernels import gated_delta_rule, plan
from compressm.kernels.core import cpp
from compressm.kernels.gated_delta_rule.op import gated_delta_rule_op

both_decays = pytest.mark.parametrize("channelwise", [False, True], ids=["head", "channel"])


def compare(inputs, assert_close, **options):
    """Outputs and gradients of C++ and of the float64 reference agree."""
    oracle = evaluate(inputs, torch.float64, "reference", **options)
    check(evaluate(inputs, torch.float32, "cpp", **options), oracle, assert_close, torch.float32)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(golden, name):
    g = golden(name)
    leaves = {key: g[key].float().requires_grad_() for key in TENSORS}
    o, last = gated_delta_rule(**leaves, scale=g["scale"].item(), output_final_state=True, backend="cpp")
    gradients = torch.autograd.grad((o, last), list(leaves.values()), (g["w"].float(), g["w_state"].float()))
    for key, value in (("out", o), ("last_state", last)):
        assert (value.detach() - g[key]).norm() <= 2e-6 * g[key].norm(), key
    for key, gradient in zip(leaves, gradients, strict=True):
        assert (gradient - g[f"grad_{key}"]).norm() <= 1e-5 * g[f"grad_{key}"].norm(), key


@pytest.mark.parametrize("keys", [1, 5, 13, 64, 100])
@pytest.mark.parametrize("length", [1, 33, 65])
@both_decays
@pytest.mark.usefixtures("poisoned_memory")
def test_any_number_of_keys(assert_close, keys, length, channelwise):
    compare(random_inputs(2, length, 1, 2, keys, 7, channelwise=channelwise), assert_close)


@pytest.mark.parametrize("values", [1, 7, 16, 33, 64, 150])
@pytest.mark.parametrize(("shared", "heads"), [(1, 1), (3, 3), (2, 6)])
@both_decays
@pytest.mark.usefixtures("poisoned_memory")
def test_any_number_of_values_and_heads(assert_close, values, shared, heads, channelwise):
    compare(random_inputs(2, 41, shared, heads, 6, values, channelwise=channelwise), assert_close)


@pytest.mark.parametrize("chunk", [1, 7, 16, 40, 300])
@both_decays
@pytest.mark.usefixtures("poisoned_memory")
def test_any_chunk_on_every_instruction_set(assert_close, chunk, channelwise, isa):
    assert cpp.library().isa() == isa
    compare(random_inputs(1, 90, 2, 4, 11, 19, channelwise=channelwise), assert_close, chunk_size=chunk)


@pytest.mark.parametrize("decay", [1e-4, 20.0, None])
@both_decays
@pytest.mark.usefixtures("poisoned_memory")
def test_decays_of_all_sizes_on_every_instruction_set(assert_close, decay, channelwise, isa):
    inputs = random_inputs(2, 70, 2, 2, 9, 5, channelwise=channelwise, decay=decay or 1.0)
    inputs = mixed_decays(inputs) if decay is None else inputs
    compare({name: tensor.float().double() for name, tensor in inputs.items()}, assert_close, chunk_size=64)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("state", [False, True])
@both_decays
@pytest.mark.usefixtures("poisoned_memory")
def test_options(assert_close, normalize, state, channelwise):
    inputs = random_inputs(2, 40, 2, 4, 5, 4, channelwise=channelwise, state=state)
    compare(inputs, assert_close, scale=1.3, use_qk_l2norm_in_kernel=normalize)


def test_keys_of_no_length_are_kept_from_division_by_zero(assert_close):
    inputs = random_inputs(1, 20, 1, 2, 5, 4)
    inputs["k"][0, 7] = 0.0
    inputs["q"][0, 9] = 1e-4 * inputs["q"][0, 9]
    compare(inputs, assert_close, use_qk_l2norm_in_kernel=True)


@pytest.mark.parametrize("layout", ["slice", "transposed", "strided", "expanded", "projected"])
@both_decays
@pytest.mark.usefixtures("poisoned_memory")
def test_layouts(assert_close, layout, channelwise):
    inputs = random_inputs(2, 37, 2, 4, 6, 5, channelwise=channelwise)
    laid = {name: t.float() for name, t in inputs.items()}
    if layout == "expanded":
        for name, axis in (("q", 3), ("k", 0), ("v", 1), ("g", 2), ("beta", 0)):
            inputs[name] = inputs[name].narrow(axis, 0, 1).expand(inputs[name].shape)
            laid[name] = inputs[name].narrow(axis, 0, 1).float().expand(inputs[name].shape)
    elif layout == "strided":
        laid = {name: t.repeat_interleave(2, -1)[..., ::2] for name, t in laid.items()}
    elif layout == "projected":  # as a layer's projection leaves them
        names = ("q", "k", "v", "beta")
        parts = [laid[name].flatten(2) for name in names]
        pieces = torch.cat(parts, -1).split([t.shape[-1] for t in parts], -1)
        laid |= {name: t.unflatten(-1, inputs[name].shape[2:]) for name, t in zip(names, pieces, strict=True)}
        assert not laid["v"].is_contiguous()
    else:
        laid = {name: lay_out(t, layout) for name, t in laid.items()}
    check(evaluate(laid, None, "cpp"), evaluate(inputs, torch.float64, "reference"), assert_close, torch.float32)


@pytest.mark.parametrize("given", [0, 1], ids=["o", "final state"])
@pytest.mark.parametrize("expanded", [False, True])
@both_decays
@pytest.mark.usefixtures("poisoned_memory")
def test_one_gradient_comes_in(assert_close, given, expanded, channelwise):
    inputs = random_inputs(2, 40, 1, 2, 4, 5, channelwise=channelwise)
    found = []
    for dtype, backend in ((torch.float32, "cpp"), (torch.float64, "reference")):
        leaves = {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}
        wanted = gated_delta_rule(**leaves, output_final_state=True, backend=backend)[given]
        loss = wanted.sum() if expanded else (wanted * torch.linspace(0, 1, wanted.shape[-1], dtype=dtype)).sum()
        found.append(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True))
    for name, actual, expected in zip(inputs, *found, strict=True):
        assert_close(actual, expected, name)


@pytest.mark.parametrize("bounds", [[0, 7, 7, 40, 104], [0, 0, 33, 33], [0, 100, 101], list(range(0, 31, 3))], ids=str)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@both_decays
@pytest.mark.usefixtures("poisoned_memory")
def test_packed_sequences(assert_close, bounds, integer, channelwise):
    inputs = random_inputs(1, bounds[-1], 2, 4, 3, 5, sequences=len(bounds) - 1, channelwise=channelwise)
    compare(inputs, assert_close, cu_seqlens=torch.tensor(bounds, dtype=integer))
    inputs["initial_state"] = None
    compare(inputs, assert_close, cu_seqlens=torch.tensor(bounds, dtype=integer), chunk_size=16)


SETTINGS = (None, False, 0, "cpp")


@pytest.mark.parametrize("bounds", [[0, 9, 4, 12], [0, 13], [-3, 12], [1, 12], [0, 1 << 40, 12]], ids=str)
def test_the_kernel_itself_refuses_wrong_bounds(bounds):
    arguments = [None if t is None else t.float() for t in random_inputs(1, 12, state=False).values()]
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        gated_delta_rule_op(*arguments, torch.tensor(bounds), *SETTINGS)


@both_decays
def test_the_kernel_itself_refuses_wrong_shapes(channelwise):
    arguments = [t.float() for t in random_inputs(2, 12, 2, 4, 5, 3, channelwise=channelwise).values()]
    for position in range(len(arguments)):
        wrong = list(arguments)
        wrong[position] = arguments[position][:, :-1]
        with pytest.raises(RuntimeError, match="expected a float32 CPU tensor of shape"):
            gated_delta_rule_op(*wrong, None, *SETTINGS)
    with pytest.raises(RuntimeError, match="chunk"):
        gated_delta_rule_op(*arguments, None, None, False, -1, "cpp")


@pytest.mark.parametrize("sizes", [(1, 300, 1, 3, 20, 130), (2, 70, 4, 8, 40, 5), (5, 40, 2, 2, 5, 7)], ids=str)
@both_decays
def test_the_same_bits_for_any_number_of_threads(sizes, channelwise):
    inputs = random_inputs(*sizes, channelwise=channelwise)
    check_threads(lambda: evaluate(inputs, torch.float32, "cpp"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(assert_close, dtype):
    inputs = random_inputs(2, 65, 2, 4, 9, 7)
    inputs = {name: t if name == "initial_state" else t.to(dtype).double() for name, t in inputs.items()}
    results = evaluate(inputs, dtype, "cpp", use_qk_l2norm_in_kernel=True)
    assert results["o"].dtype == dtype
    assert results["last"].dtype == torch.float32
    oracle = evaluate(inputs, torch.float64, "reference", use_qk_l2norm_in_kernel=True)
    check(results, oracle, assert_close, dtype)
    assert_close(results["last"], oracle["last"], "last", torch.float32)


def test_what_the_backward_keeps_is_the_arguments():
    leaves = {k: t.float().requires_grad_() for k, t in random_inputs(2, 200, 2, 4, 30, 16).items()}
    own, kept = {t.data_ptr() for t in leaves.values()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        o, _ = gated_delta_rule(**leaves, use_qk_l2norm_in_kernel=True, backend="cpp")
    assert o.requires_grad
    assert set(kept) == own


def test_it_is_what_a_cpu_runs(cpp_calls):
    shapes = {"k": (2, 33, 2, 5), "v": (2, 33, 4, 3)}
    assert plan("gated_delta_rule", shapes).backend == "cpp"
    assert plan("gated_delta_rule", shapes, torch.float64).backend == "reference"
    leaves = {k: t.float().requires_grad_() for k, t in random_inputs().items()}
    with cpp_calls() as seen:
        o, _ = gated_delta_rule(**leaves)
        o.sum().backward()
    assert seen == {"gated_delta_rule": 1, "gated_delta_rule_backward": 1}
    assert torch.equal(o, gated_delta_rule(**leaves, backend="cpp")[0])
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        gated_delta_rule(**random_inputs(), backend="cpp")


@pytest.mark.parametrize("packed", [False, True])
def test_custom_op_is_well_formed(packed):
    inputs = random_inputs(1, 70, 2, 4, 5, 3, sequences=3 if packed else 1, channelwise=packed)
    arguments = [t.float().requires_grad_() for t in inputs.values()]
    bounds = torch.tensor([0, 3, 3, 70]) if packed else None
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    torch.library.opcheck(gated_delta_rule_op.op, (*arguments, bounds, *SETTINGS), test_utils=tests)
    arguments[-1] = None
    torch.library.opcheck(gated_delta_rule_op.op, (*arguments, bounds, 0.5, True, 16, "cpp"), test_utils=tests)


@pytest.mark.slow
def test_compiles_with_inductor(assert_close):
    inputs = random_inputs(1, 40, 2, 4, 5, 3, sequences=3)
    options = {"cu_seqlens": torch.tensor([0, 13, 13, 40]), "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    check_inductor(gated_delta_rule, inputs, assert_close, **options)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_random_sizes(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    shared = draw(1, 3)
    sizes = draw(1, 3), draw(1, 70), shared, shared * draw(1, 3), draw(1, 20), draw(1, 20)
    inputs = random_inputs(*sizes, channelwise=data.draw(st.booleans()), seed=draw(0, 99))
    oracle = evaluate(inputs, torch.float64, "reference")
    for name, value in evaluate(inputs, torch.float32, "cpp", chunk_size=draw(1, 90)).items():
        rounding = 1e-6 * value.numel() ** 0.5  # where the terms of a sum, of order 1, cancel
        assert (value - oracle[name]).norm() <= 2e-5 * oracle[name].norm() + rounding, name
