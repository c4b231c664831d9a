"""The C++ selective scan against the float64 reference: outputs, all gradients, layouts, packing, instruction sets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.evaluation import check, check_inductor, check_threads
from kernels.selective_scan_cases import TENSORS, evaluate, random_inputs

from compressm.errors import ArgumentError, BackendError
from compressm.kernels import plan, selective_scan, selective_state_update
from compressm.kernels.core import cpp
from compressm.kernels.selective_scan import cpu
from compressm.kernels.selective_scan.cpu import STEPS, checkpoint_shape
from compressm.kernels.selective_scan.op import selective_scan_op

GOLDEN = ["scan_B2_D3_L33_N5_G1", "scan_B1_D4_L130_N12_G1", "scan_B2_D8_L64_N16_G2", "scan_B1_D2_L257_N128_G1"]


def compare(inputs, assert_close, dtype=torch.float32, **options):
    """Outputs and gradients of the C++ scan and of the float64 reference agree."""
    oracle = evaluate(inputs, torch.float64, "reference", **options)
    check(evaluate(inputs, dtype, "cpp", **options), oracle, assert_close, dtype)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(golden, name):
    g = golden(name)
    leaves = {key: g[key].float().requires_grad_() for key in TENSORS if key in g}
    out, last = selective_scan(**leaves, delta_softplus=True, return_last_state=True, backend="cpp")
    gradients = torch.autograd.grad((out * g["w"].float()).sum(), list(leaves.values()))
    for key, value, bound in (("out", out, 2e-6), ("last_state", last, 2e-6)):
        assert (value.detach() - g[key]).norm() <= bound * g[key].norm(), key
    for key, gradient in zip(leaves, gradients, strict=True):
        assert (gradient - g[f"grad_{key}"]).norm() <= 1e-5 * g[f"grad_{key}"].norm(), key


@pytest.mark.parametrize("states", [1, 5, 12, 13, 100, 128, 300])
@pytest.mark.parametrize("length", [1, 33])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.usefixtures("poisoned_memory")
def test_any_number_of_states(assert_close, states, length, channels_last):
    compare(random_inputs(2, 17, length, states, channels_last=channels_last), assert_close)


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (3, 3), (16, 1), (16, 2), (17, 1), (40, 1), (40, 2), (40, 40)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.usefixtures("poisoned_memory")
def test_any_number_of_channels_and_groups(assert_close, channels, groups, channels_last):
    compare(random_inputs(2, channels, 41, 6, groups, channels_last=channels_last), assert_close)


@pytest.mark.parametrize(("batch", "channels"), [(1, 200), (3, 130), (20, 70)])
@pytest.mark.usefixtures("poisoned_memory")
def test_several_segments_and_shares(assert_close, batch, channels):
    compare(random_inputs(batch, channels, 290 if batch < 20 else 65, 3), assert_close)


@pytest.mark.usefixtures("poisoned_memory")
def test_long_sequence(assert_close):
    compare(random_inputs(1, 16, 257, 12), assert_close)


@pytest.mark.parametrize("without", ["D", "z", "delta_bias", "initial_state", "D z delta_bias initial_state"])
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.usefixtures("poisoned_memory")
def test_optional_arguments(assert_close, without, softplus):
    inputs = random_inputs(2, 5, 37, 4, without=without.split())
    if not softplus:
        inputs["delta"] = inputs["delta"].abs() * 0.1 + (0 if "delta_bias" in without else 7)
    compare(inputs, assert_close, delta_softplus=softplus)


def evaluate_in_place(leaves, assert_close, oracle):
    """``evaluate`` of float32 tensors whose strides stay as they are, compared with the oracle."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
    out, last = selective_scan(**leaves, delta_softplus=True, return_last_state=True, backend="cpp")
    draw = torch.Generator().manual_seed(7)
    weights = [torch.randn(t.shape, generator=draw, dtype=torch.float64).float() for t in (out, last)]
    gradients = torch.autograd.grad((out, last), list(leaves.values()), weights)
    results = {"out": out.detach(), "last": last.detach(), **dict(zip(leaves, gradients, strict=True))}
    check(results, oracle, assert_close, torch.float32)


@pytest.mark.parametrize("channels_last", [False, True])
def test_strides(assert_close, channels_last):
    inputs = random_inputs(2, 18, 35, 7, 2, channels_last=channels_last)
    odd = {}
    for name, tensor in inputs.items():
        if tensor.dim() == 1:
            odd[name] = tensor.float().repeat_interleave(3)[::3]
        else:
            odd[name] = tensor.float().repeat_interleave(2, -1).repeat_interleave(2, 0)[::2, ..., ::2]
        assert odd[name].stride(-1) != 1
    evaluate_in_place(odd, assert_close, evaluate(inputs, torch.float64, "reference"))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 1, 3, 2), (3, 2, 1, 0)], ids=str)
def test_mixing_layouts(assert_close, order):
    inputs = random_inputs(2, 18, 35, 11, 2)
    oracle = evaluate(inputs, torch.float64, "reference")
    for name in ("B", "C"):
        laid = inputs[name].permute(order).contiguous()
        inputs[name] = laid.permute([order.index(axis) for axis in range(4)])
    check(evaluate(inputs, torch.float32, "cpp"), oracle, assert_close, torch.float32)


def test_expanded_mixing_and_input(assert_close):
    inputs = random_inputs(2, 18, 35, 7)
    expanded = {name: tensor.float() for name, tensor in inputs.items()}
    for name, axis in (("B", 0), ("C", 3), ("u", 1)):
        expanded[name] = expanded[name].narrow(axis, 0, 1).expand(expanded[name].shape)
        inputs[name] = inputs[name].narrow(axis, 0, 1).expand(inputs[name].shape)
        assert 0 in expanded[name].stride()
    evaluate_in_place(expanded, assert_close, evaluate(inputs, torch.float64, "reference"))


BOUNDS = [[0, 7, 7, 40, 104, 137], [0, 0, 33, 33], [0, 300, 301, 302], list(range(0, 61, 3))]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.usefixtures("poisoned_memory")
def test_packed_sequences(assert_close, bounds, integer):
    inputs = random_inputs(1, 19, bounds[-1], 5, sequences=len(bounds) - 1)
    compare(inputs, assert_close, cu_seqlens=torch.tensor(bounds, dtype=integer))
    inputs["initial_state"] = None
    compare(inputs, assert_close, cu_seqlens=torch.tensor(bounds, dtype=integer))


@pytest.mark.parametrize("bounds", [[0, 9, 4, 12], [0, 13], [-3, 12], [1, 12], [0, 1 << 40, 12]], ids=str)
def test_the_kernel_itself_refuses_wrong_bounds(bounds):
    names = random_inputs(1, 3, 12, 4, without=["initial_state"])
    arguments = [None if t is None else t.float() for t in names.values()]
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        selective_scan_op(*arguments, torch.tensor(bounds), True, True, "cpp")


def test_the_kernel_itself_refuses_wrong_shapes():
    arguments = [t.float() for t in random_inputs(2, 3, 12, 4).values()]
    for position in range(len(arguments)):
        wrong = list(arguments)
        wrong[position] = arguments[position][1:] if arguments[position].dim() == 1 else arguments[position][..., 1:]
        with pytest.raises(RuntimeError, match="expected a float32 CPU tensor of shape"):
            selective_scan_op(*wrong, None, True, True, "cpp")


def test_every_instruction_set(assert_close, isa):
    assert cpp.library().isa() == isa
    for channels_last in (False, True):
        inputs = random_inputs(2, 37, 43, 13, channels_last=channels_last)
        compare(inputs, assert_close)
        inputs["A"] = inputs["A"] * 40  # gains down to exp(-4000)
        inputs["delta"] = inputs["delta"] * 5
        compare(inputs, assert_close)
    same_steps(random_inputs(2, 37, 6, 21, 1), assert_close)


@pytest.mark.parametrize("shape", [(1, 130, 300, 5), (2, 70, 70, 12), (20, 9, 40, 7)])
def test_the_same_bits_for_any_number_of_threads(shape):
    inputs = random_inputs(*shape)
    check_threads(lambda: evaluate(inputs, torch.float32, "cpp"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(assert_close, dtype):
    inputs = random_inputs(2, 17, 65, 9)
    for name in ("u", "delta", "B", "C", "z"):
        inputs[name] = inputs[name].to(dtype).double()
    results = evaluate(inputs, dtype, "cpp")
    assert results["out"].dtype == dtype
    assert results["last"].dtype == torch.float32
    oracle = evaluate(inputs, torch.float64, "reference")
    check(results, oracle, assert_close, dtype)
    assert_close(results["last"], oracle["last"], "last", torch.float32)


@pytest.mark.usefixtures("poisoned_memory")
def test_bfloat16_rows_of_channels_are_taken_as_they_lie(assert_close, monkeypatch, isa):
    seen = []
    inner = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda u, *rest: seen.append(u.dtype) or inner(u, *rest))
    for channels, groups, without in ((37, 1, ()), (64, 2, ("z",)), (5, 5, ("delta_bias", "D"))):
        inputs = random_inputs(2, channels, 45, 7, groups, channels_last=True, without=without)
        for name in ("u", "delta", "B", "C", "z"):
            if inputs[name] is not None:
                inputs[name] = inputs[name].to(torch.bfloat16).double()
        compare(inputs, assert_close, torch.bfloat16)
    assert seen == [torch.bfloat16] * 3


def test_small_step_sizes_keep_their_digits():
    dt = torch.logspace(-8, 1.3, 800, dtype=torch.float64)
    delta = torch.where(dt < 10, dt.expm1().log(), dt)[None, None].float()
    exact = torch.nn.functional.softplus(delta.double(), threshold=1e9)
    ones = torch.ones(1, 1, 1, 800)
    out = selective_scan(
        torch.ones_like(delta), delta, torch.full((1, 1), -1e8), ones, ones, delta_softplus=True, backend="cpp"
    )
    forgotten = dt[None, None] > 1e-6  # exp(-1e8 dt) = 0: the output is dt itself
    assert ((out - exact).abs() / exact)[forgotten].max() < 3e-7
    large = torch.linspace(25, 1000, 100)[None, None]
    ones = torch.ones(1, 1, 1, 100)
    rate = torch.full((1, 1), -50.0)
    out = selective_scan(torch.ones_like(large), large, rate, ones, ones, delta_softplus=True, backend="cpp")
    assert torch.equal(out, large)


def test_slow_modes_keep_their_gain(assert_close):
    inputs = random_inputs(1, 16, 2000, 3, without=["z"])
    inputs["A"] = torch.full((16, 3), -1e-3, dtype=torch.float64)
    inputs["u"] = inputs["u"].abs()
    compare(inputs, assert_close)


def test_exponents_in_and_out_of_range(assert_close):
    inputs = random_inputs(2, 40, 70, 7, without=["z"])
    inputs["delta"] += torch.linspace(-3, 40, 40, dtype=torch.float64)[:, None]  # dt A from about -0.1 to -1e4
    inputs["A"] = -torch.logspace(0, 2.4, 7, dtype=torch.float64).expand(40, 7).clone()
    compare(inputs, assert_close)


def test_states_and_inputs_that_vanish_cost_no_more():
    inputs = {k: v if v is None else v.float() for k, v in random_inputs(1, 16, 64, 4, without=["z"]).items()}
    inputs["u"] = torch.zeros_like(inputs["u"])
    inputs["initial_state"] = torch.full_like(inputs["initial_state"], 1e-36)
    _, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True, backend="cpp")
    assert ((last == 0) | (last.abs() > 1e-38)).all()


def same_steps(inputs, assert_close):
    """Decode steps from the initial state give the scan's outputs and last state."""
    inputs = {name: None if t is None else t.float() for name, t in inputs.items()}
    out, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True, backend="cpp")
    state = inputs["initial_state"].clone()
    for t in range(out.shape[-1]):
        x, dt, z, B, C = (None if inputs[k] is None else inputs[k][..., t] for k in ("u", "delta", "z", "B", "C"))
        step = selective_state_update(
            state, x, dt, inputs["A"], B, C, inputs["D"], z, inputs["delta_bias"], dt_softplus=True, backend="cpp"
        )
        assert_close(step, out[..., t].double(), f"step {t}")
    assert_close(state, last.double(), "last")


@pytest.mark.parametrize(("channels", "states", "groups"), [(1, 1, 1), (6, 5, 2), (17, 16, 1), (40, 35, 4)])
@pytest.mark.parametrize("without", [(), ("D", "z", "delta_bias")], ids=["all", "bare"])
def test_decode_steps_are_the_scan(assert_close, channels, states, groups, without):
    same_steps(random_inputs(3, channels, 5, states, groups, without=without), assert_close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_step_advances_any_state_in_place(assert_close, dtype):
    inputs = random_inputs(2, 6, 1, 5)
    names = ("u", "delta", "A", "B", "C")
    given = [inputs[k] if k == "A" else inputs[k][..., 0] for k in names]
    state = inputs["initial_state"].to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    exact = state.double()
    expected = selective_state_update(exact, *given, backend="reference")
    out = selective_state_update(state, *(t.float() for t in given), backend="cpp")
    assert_close(out, expected, "out", dtype)
    assert_close(state.double(), exact, "state", dtype)


def test_compiles_into_one_graph(assert_close):
    inputs = random_inputs(2, 17, 40, 5)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    oracle = evaluate(inputs, torch.float64, "reference")
    check(evaluate(inputs, torch.float32, "cpp", call=compiled), oracle, assert_close, torch.float32)


@pytest.mark.slow
def test_compiles_with_inductor(assert_close):
    inputs = random_inputs(1, 17, 40, 5, sequences=3)
    options = {"cu_seqlens": torch.tensor([0, 13, 13, 40]), "delta_softplus": True, "return_last_state": True}
    check_inductor(selective_scan, inputs, assert_close, **options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_custom_op_is_well_formed(packed, channels_last):
    sequences = 3 if packed else 1
    inputs = random_inputs(1, 5, 70, 4, sequences=sequences, channels_last=channels_last)
    arguments = [t.float().requires_grad_() for t in inputs.values()]
    bounds = torch.tensor([0, 3, 3, 70]) if packed else None
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    torch.library.opcheck(selective_scan_op.op, (*arguments, bounds, True, True, "cpp"), test_utils=tests)
    arguments = [t.detach() for t in arguments]
    arguments[6] = None
    torch.library.opcheck(selective_scan_op.op, (*arguments, bounds, True, False, "cpp"), test_utils=tests)


def test_what_the_backward_keeps_is_a_state_per_tile():
    arguments = [None if t is None else t.float() for t in random_inputs(2, 24, 640, 30, without=["z"]).values()]
    _, _, checkpoints, y = selective_scan_op(*arguments, None, True, True, "cpp")
    assert checkpoints.shape == checkpoint_shape(2, 24, 640, 30, False, 2) == (2 * 640 // STEPS, 30, 24)
    assert y.numel() == 0
    _, _, checkpoints, _ = selective_scan_op(*arguments, None, True, False, "cpp")
    assert checkpoints.numel() == 0


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_random_shapes(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    groups = draw(1, 3)
    batch, channels, length, states = draw(1, 3), groups * draw(1, 20), draw(1, 80), draw(1, 20)
    channels_last = data.draw(st.booleans())
    inputs = random_inputs(batch, channels, length, states, groups, channels_last=channels_last, seed=draw(0, 99))
    oracle = evaluate(inputs, torch.float64, "reference")
    for name, value in evaluate(inputs, torch.float32, "cpp").items():
        rounding = 1e-6 * value.numel() ** 0.5  # where the terms of a sum, of order 1, cancel
        assert (value - oracle[name]).norm() <= 2e-5 * oracle[name].norm() + rounding, name


def test_it_is_what_a_cpu_runs():
    shapes = {"u": (2, 16, 33), "A": (16, 5)}
    assert plan("selective_scan", shapes).backend == "cpp"
    assert plan("selective_scan", shapes).get("steps") == STEPS
    assert plan("selective_scan", shapes, torch.float64).backend == "reference"
    with pytest.raises(ArgumentError, match=r"u \(batch, D, L\) and A \(D, N\)"):
        plan("selective_scan", {**shapes, "A": (15, 5)})
    inputs = {k: t.float() for k, t in random_inputs(2, 3, 33, 5).items()} | {"delta_softplus": True}
    assert torch.equal(selective_scan(**inputs), selective_scan(**inputs, backend="cpp"))
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        selective_scan(**random_inputs(1, 2, 3, 2), backend="cpp")
    constant = {k: t.float() for k, t in random_inputs(1, 2, 3, 2, constant=["B"]).items()}
    with pytest.raises(BackendError, match="depend on time"):
        selective_scan(**constant, backend="cpp")
    assert plan("selective_scan", shapes, backend="reference").backend == "reference"
