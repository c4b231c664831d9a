"""Linear attention against its recurrence in float64: outputs, all gradients, packing, one step, wrong arguments."""

from __future__ import annotations

import math

import pytest
import torch
from kernels.evaluation import check, check_threads
from kernels.layouts import lay_out
from kernels.linear_attention_cases import DECAYS, evaluate, random_inputs, recurrence

from compressm.errors import ArgumentError, BackendError
from compressm.kernels import linear_attention, linear_attention_update, plan
from compressm.kernels.core import cpp
from compressm.kernels.linear_attention import chunked
from compressm.kernels.linear_attention.op import linear_attention_op
from compressm.kernels.ssd.op import ssd_op


def compare(inputs, assert_close, dtype=torch.float32, backend=None, **options):
    """Outputs and gradients agree with the recurrence in float64."""
    given = {name: value for name, value in options.items() if name != "chunk_size"}
    oracle = evaluate(inputs, torch.float64, None, call=recurrence, **given)
    check(evaluate(inputs, dtype, backend, **options), oracle, assert_close, dtype)


def in_chunks(chunk):
    """With decays of channels, by torch's own products in chunks of this many steps, whatever the dtype."""

    def call(q, k, v, g, initial_state, *, backend, output_final_state, cu_seqlens=None):
        return chunked.linear_attention(q, k, v, g, initial_state, cu_seqlens, 1.0, chunk)

    return call


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_float64_is_the_recurrence(assert_close, decay, normalize, scale):
    inputs = random_inputs(2, 6, decay=decay, normalize=normalize)
    compare(inputs, assert_close, torch.float64, normalize=normalize, scale=scale)


@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_gradients_are_the_derivatives(decay):
    inputs = random_inputs(1, 5, 1, 2, 3, 2, decay=decay)

    def call(*tensors):
        return linear_attention(**dict(zip(inputs, tensors, strict=True)), output_final_state=True)

    assert torch.autograd.gradcheck(call, [tensor.requires_grad_() for tensor in inputs.values()])


SIZES = [(2, 33, 2, 4, 5, 7), (1, 1, 3, 3, 13, 16), (3, 70, 1, 2, 1, 1), (1, 40, 1, 1, 100, 80), (2, 65, 1, 3, 16, 130)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.usefixtures("poisoned_memory")
def test_any_sizes(assert_close, sizes, decay):
    inputs = random_inputs(*sizes, decay=decay)
    compare(inputs, assert_close)
    inputs["initial_state"] = None
    compare(inputs, assert_close)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.usefixtures("poisoned_memory")
def test_every_instruction_set(assert_close, decay, isa):
    assert cpp.library().isa() == isa
    compare(random_inputs(1, 75, 2, 4, 19, 21, decay=decay), assert_close, backend="cpp")


@pytest.mark.parametrize("chunk", [1, 7, 16, 300])
@pytest.mark.parametrize("decay", ["fixed", "channel"])
@pytest.mark.parametrize("backend", ["cpp", None])
@pytest.mark.usefixtures("poisoned_memory")
def test_any_chunk(assert_close, decay, chunk, backend):
    dtype = torch.float32 if backend == "cpp" else torch.float64
    compare(random_inputs(1, 50, decay=decay), assert_close, dtype, backend, chunk_size=chunk)


@pytest.mark.parametrize("decay", ["fixed", "scalar", "channel"])
@pytest.mark.parametrize("strength", [1e-4, 80.0])
@pytest.mark.usefixtures("poisoned_memory")
def test_decays_of_all_sizes(assert_close, decay, strength, isa):
    inputs = random_inputs(2, 70, 1, 3, 6, 5, decay=decay, strength=strength)
    compare(inputs, assert_close, backend="cpp")
    if decay == "channel":  # strong and weak ones side by side, and a step that forgets
        inputs["g"] = inputs["g"] * torch.tensor([1e-3, 1e-2, 0.1, 1.0, 0.0, 1e-4]).double()
        inputs["g"][:, 30, :, 1] = -20.0
        compare(inputs, assert_close, backend="cpp")
        inputs["g"] = torch.full_like(inputs["g"], -20.0)
        compare(inputs, assert_close, backend="cpp")


@pytest.mark.parametrize("least", [-1e9, -1e30, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_at_which_a_head_forgets_all(assert_close, least, dtype, isa):
    inputs = random_inputs(2, 40, 1, 3, 6, 5, decay="scalar")
    inputs["g"][:, 5], inputs["g"][:, 21, 0] = least, least
    forgets = evaluate({**inputs, "g": inputs["g"].clamp(min=-1e3)}, torch.float64, None, call=recurrence)
    check(evaluate(inputs, dtype, "cpp"), forgets, assert_close, dtype)


@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
@pytest.mark.parametrize("strength", [1e-4, 1.0, 80.0])
def test_torch_in_chunks(assert_close, chunk, strength):
    inputs = random_inputs(2, 40, strength=strength)
    inputs["g"][:, 20, :, 1] = -20.0
    oracle = evaluate(inputs, torch.float64, None, call=recurrence, scale=1.0)
    for dtype in (torch.float64, torch.float32):
        check(evaluate(inputs, dtype, None, call=in_chunks(chunk)), oracle, assert_close, dtype)


def test_torch_in_chunks_as_an_op(assert_close):
    """What runs where there is no kernel and something traces."""

    def call(q, k, v, g, initial_state, *, backend, output_final_state):
        return linear_attention_op.op(q, k, v, g, initial_state, None, 1.0, 0, "chunked")

    inputs = random_inputs(1, 20)
    oracle = evaluate(inputs, torch.float64, None, call=recurrence, scale=1.0)
    check(evaluate(inputs, torch.float32, None, call=call), oracle, assert_close, torch.float32)


def test_torch_in_chunks_where_heads_decay(assert_close):
    def call(q, k, v, g, initial_state, *, backend, output_final_state):
        settings = (False, -math.inf, math.inf, False, 1.0, 16, "chunked")
        ones, start = g.new_ones(4), initial_state.mT
        out, last = ssd_op(v, g, ones, k, q, None, None, None, start, None, None, *settings)
        return out, last.mT

    inputs = random_inputs(1, 40, decay="scalar")
    oracle = evaluate(inputs, torch.float64, None, call=recurrence, scale=1.0)
    check(evaluate(inputs, torch.float64, None, call=call), oracle, assert_close, torch.float64)
    inputs["g"][:, 5], inputs["g"][:, 21, 0] = -1e9, torch.finfo(torch.float32).min  # forget all, as masks do
    oracle = evaluate(inputs, torch.float64, None, call=recurrence, scale=1.0)
    check(evaluate(inputs, torch.float32, None, call=call), oracle, assert_close, torch.float32)


BOUNDS = [[0, 7, 7, 40, 77], [0, 0, 33, 33], list(range(0, 21, 3))]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.usefixtures("poisoned_memory")
def test_packed_sequences(assert_close, bounds, decay):
    inputs = random_inputs(1, bounds[-1], decay=decay, sequences=len(bounds) - 1, normalize=True)
    options = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32), "normalize": True}
    compare(inputs, assert_close, **options)
    compare(inputs, assert_close, torch.float64, **options)
    if decay == "channel":
        inputs["initial_state"] = inputs["initial_state"][..., :-1]
        oracle = evaluate(inputs, torch.float64, None, call=recurrence, scale=1.0, cu_seqlens=options["cu_seqlens"])
        found = evaluate(inputs, torch.float64, None, call=in_chunks(8), cu_seqlens=options["cu_seqlens"])
        check(found, oracle, assert_close, torch.float64)


@pytest.mark.parametrize("layout", ["slice", "transposed"])
@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.usefixtures("poisoned_memory")
def test_layouts(assert_close, layout, decay):
    inputs = random_inputs(decay=decay)

    def call(**leaves):
        backend, last = leaves.pop("backend"), leaves.pop("output_final_state")
        laid = {name: lay_out(t.detach(), layout).requires_grad_() for name, t in leaves.items()}
        elsewhere = [t if name in ("q", "g") else laid[name] for name, t in leaves.items()]
        return linear_attention(**dict(zip(leaves, elsewhere, strict=True)), backend=backend, output_final_state=last)

    found, expected = evaluate(inputs, torch.float32, "cpp", call=call), evaluate(inputs, torch.float32, "cpp")
    for name in ("out", "last", "q", "g"):
        assert_close(found[name], expected[name], name)
    out, _ = linear_attention(**{name: lay_out(t.float(), layout) for name, t in inputs.items()}, backend="cpp")
    assert_close(out, expected["out"])


@pytest.mark.parametrize("decay", ["fixed", "channel"])
@pytest.mark.parametrize("given", [[0], [1]], ids=["out", "last"])
@pytest.mark.usefixtures("poisoned_memory")
def test_one_output_alone(assert_close, decay, given):
    inputs = random_inputs(1, 40, decay=decay)
    found = []
    for dtype, call in ((torch.float32, linear_attention), (torch.float64, recurrence)):
        leaves = {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}
        outputs = call(**leaves, **({"output_final_state": True} if call is linear_attention else {}))
        loss = sum(outputs[k].square().sum() for k in given)
        found.append(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True))
    for name, actual, expected in zip(inputs, *found, strict=True):
        assert_close(actual, expected, name)


@pytest.mark.parametrize("decay", DECAYS)
def test_one_step_in_place(assert_close, decay):
    inputs = random_inputs(2, 4, decay=decay, normalize=True)
    state, steps, parts = inputs.pop("initial_state").float(), {}, []
    out, last = recurrence(**inputs, initial_state=state.double(), normalize=True)
    before = state
    for t in range(4):
        steps = {name: v if v is None or v.dim() == 1 else v[:, t] for name, v in inputs.items()}
        steps = {name: None if v is None else v.float() for name, v in steps.items()}
        parts.append(linear_attention_update(state, **steps, normalize=True))
    assert state is before
    assert_close(torch.stack(parts, 1), out)
    assert_close(state, last)
    steps = {name: None if v is None or v.dim() == 1 else v.float()[:, 0] for name, v in inputs.items()}
    zero = torch.zeros(2, 4, 5, 3)
    first = linear_attention_update(zero, **{**steps, "g": None}, scale=0.5)
    assert_close(first, recurrence(inputs["q"][:, :1], inputs["k"][:, :1], inputs["v"][:, :1], scale=0.5)[0][:, 0])


@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_the_same_bits_for_any_number_of_threads(decay):
    inputs = random_inputs(2, 70, 2, 4, 40, 70, decay=decay)
    check_threads(lambda: evaluate(inputs, torch.float32, "cpp"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_half_precision(assert_close, dtype, decay, backend):
    inputs = random_inputs(2, 40, decay=decay)
    for name in "qkv":
        inputs[name] = inputs[name].to(dtype).double()
    results = evaluate(inputs, dtype, backend)
    assert results["out"].dtype == dtype
    assert results["last"].dtype == torch.float32
    check(results, evaluate(inputs, torch.float64, None, call=recurrence), assert_close, dtype)


@pytest.mark.parametrize("decay", DECAYS)
def test_which_kernels_run(cpp_calls, decay):
    leaves = {name: None if t is None else t.float().requires_grad_() for name, t in random_inputs(decay=decay).items()}
    with cpp_calls() as seen:
        out, last = linear_attention(**leaves)
        out.sum().backward()
    name = "linear_attention" if decay == "channel" else "ssd"
    assert seen == {name: 1, f"{name}_backward": 1}
    assert last is None
    assert all(leaf is None or leaf.grad is not None for leaf in leaves.values())
    with pytest.raises(BackendError, match="expected one of cpp, reference, triton"):
        linear_attention(**leaves, backend="cuda")


def test_what_the_backward_keeps_is_the_arguments():
    leaves = {name: t.float().requires_grad_() for name, t in random_inputs(2, 200, 2, 2, 16, 30).items()}
    own, kept = {t.data_ptr() for t in leaves.values()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        linear_attention(**leaves, backend="cpp")
    assert set(kept) == own


def test_plans():
    shapes = {"q": (2, 300, 2, 64), "v": (2, 300, 4, 32)}
    assert plan("linear_attention", shapes).form == "chunks"
    assert plan("linear_attention", {**shapes, "g": (2, 300, 4)}).get("chunk") == plan("linear_attention", shapes).get("chunk")
    channels = {**shapes, "g": (2, 300, 4, 64)}
    assert plan("linear_attention", channels).form == "walk"
    assert plan("linear_attention", channels, torch.float64).form == "scan"
    with pytest.raises(ArgumentError, match="H dividing HV"):
        plan("linear_attention", {**shapes, "q": (2, 300, 3, 64)})


@pytest.mark.parametrize("backend", ["cpp", "reference", "chunked"])
@pytest.mark.parametrize("packed", [False, True])
def test_custom_op_is_well_formed(packed, backend):
    inputs = random_inputs(1, 20, 1, 2, 3, 4, sequences=3 if packed else 1)
    arguments = [t.float().requires_grad_() for t in inputs.values()]
    bounds = torch.tensor([0, 3, 3, 20]) if packed else None
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    torch.library.opcheck(linear_attention_op.op, (*arguments, bounds, 0.5, 0, backend), test_utils=tests)
    arguments[-1] = None
    torch.library.opcheck(linear_attention_op.op, (*arguments, bounds, 0.5, 0, backend), test_utils=tests)


@pytest.mark.parametrize("bounds", [[0, 9, 4, 12], [0, 13], [-3, 12], [1, 12]], ids=str)
def test_the_kernel_itself_refuses_wrong_bounds(bounds):
    arguments = [None if t is None else t.float() for t in random_inputs(1, 12, sequences=0).values()]
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        linear_attention_op(*arguments, torch.tensor(bounds), 1.0, 0, "cpp")


def test_the_kernel_itself_refuses_wrong_shapes():
    arguments = [t.float() for t in random_inputs(2, 12).values()]
    for position in range(len(arguments)):
        wrong = list(arguments)
        wrong[position] = arguments[position][..., 1:]
        with pytest.raises(RuntimeError, match="expected a CPU tensor of"):
            linear_attention_op(*wrong, None, 1.0, 0, "cpp")
    with pytest.raises(RuntimeError, match="chunk"):
        linear_attention_op(*arguments, None, 1.0, -1, "cpp")


EMPTY = [(0, 6, 2, 4, 5, 3), (2, 0, 2, 4, 5, 3), (2, 6, 2, 0, 5, 3), (2, 6, 2, 4, 0, 3), (2, 6, 2, 4, 5, 0)]


@pytest.mark.parametrize("sizes", EMPTY, ids=["batch", "L", "HV", "K", "V"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.usefixtures("poisoned_memory")
def test_empty(sizes, decay, backend):
    batch, length, _, heads, keys, values = sizes
    inputs = random_inputs(*sizes, decay=decay)
    results = evaluate(inputs, torch.float32, backend)
    assert results["out"].shape == (batch, length, heads, values)
    assert not results["out"].numel() or not results["out"].any()
    assert results["last"].shape == (batch, heads, keys, values)
    if length == 0:
        assert torch.equal(results["last"], inputs["initial_state"].float())
    if heads == 0:
        assert not results["q"].any()


WRONG = {
    "q": [("q", lambda t: t[0]), ("q", lambda t: t.long()), ("q", lambda t: t[:, :, :0]), ("q", lambda t: t[..., :0, :])],
    "k": [("k", lambda t: t[..., 1:]), ("k", lambda t: t.cfloat()), ("k", lambda t: t.to("meta"))],
    "v": [("v", lambda t: t[0]), ("v", lambda t: t[:, 1:]), ("v", lambda t: t.long())],
    "g": [("g", lambda t: t[:, 1:]), ("g", lambda t: t[0]), ("g", lambda t: t[..., 1:]), ("g", lambda t: t.long())],
    "initial_state": [("initial_state", lambda t: t[:1]), ("initial_state", lambda t: t.mT)],
}


@pytest.mark.parametrize(("name", "wrong"), [case for cases in WRONG.values() for case in cases])
def test_wrong_tensors_are_named(name, wrong):
    inputs = random_inputs(2, 6)
    inputs[name] = wrong(inputs[name])
    with pytest.raises(ArgumentError, match=rf"^{name}: expected"):
        linear_attention(**inputs)


@pytest.mark.parametrize(
    ("name", "value"), [("chunk_size", 0), ("chunk_size", True), ("scale", True), ("scale", math.nan), ("scale", "1")]
)
def test_wrong_settings_are_named(name, value):
    with pytest.raises(ArgumentError, match=rf"^{name}: expected"):
        linear_attention(**random_inputs(2, 4), **{name: value})


@pytest.mark.parametrize("bounds", [[0, 4], [0, 5, 3, 6], [0], [0.0, 6.0]], ids=str)
def test_wrong_packing(bounds):
    with pytest.raises(ArgumentError, match=r"^cu_seqlens: expected"):
        linear_attention(**random_inputs(1, 6, sequences=0), cu_seqlens=torch.tensor(bounds))
    with pytest.raises(ArgumentError, match="batch of 1"):
        linear_attention(**random_inputs(2, 6, sequences=0), cu_seqlens=torch.tensor([0, 6]))


def test_wrong_steps():
    q, v, state = torch.randn(2, 2, 5), torch.randn(2, 4, 3), torch.zeros(2, 4, 5, 3)
    for arguments, name in (
        ((state, q[0], q[0], v), "q"), ((state, q, q, v[0]), "v"), ((state.mT, q, q, v), "state"), ((state, q, q[1:], v), "k"),
        ((state, q, q, v, v), "g"),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=rf"^{name}: expected"):
            linear_attention_update(*arguments)


@pytest.mark.parametrize("decay", ["none", "fixed", "scalar"])
def test_triton_where_heads_decay(assert_close, decay, device):
    inputs = random_inputs(1, 37, 1, 1, 5, 4, decay=decay)
    oracle = evaluate(inputs, torch.float64, None, call=recurrence)
    check(evaluate(inputs, torch.float32, "triton", device=device), oracle, assert_close, torch.float32)


def test_value_heads_share_keys_as_copies_of_them_would(assert_close):
    inputs = random_inputs(1, 9, 2, 6)
    apart = {name: t.repeat_interleave(3, 2) if name in "qk" else t for name, t in inputs.items()}
    assert_close(linear_attention(**inputs)[0], linear_attention(**apart)[0])
