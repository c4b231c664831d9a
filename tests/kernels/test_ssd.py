"""Mamba-2's scan: the reference against the definition and the golden files, torch in chunks against it; wrong arguments."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from kernels.evaluation import check
from kernels.ssd_cases import GOLDEN, TENSORS, evaluate, numbered, random_inputs
from torch.nn.functional import silu, softplus

from compressm.errors import ArgumentError, BackendError
from compressm.kernels import plan, ssd
from compressm.kernels.ssd import chunked
from compressm.kernels.ssd.form import LEAST, MOST, chunk_length
from compressm.kernels.ssd.op import ssd_op


def in_chunks(chunk):
    """ssd by torch's own products in chunks of this many steps, whatever the dtype."""

    def call(*, backend, dt_softplus, return_final_states, dt_limit=(0.0, math.inf), seq_idx=None, cu_seqlens=None, **tensors):
        return chunked.ssd(*(tensors[name] for name in TENSORS), seq_idx, cu_seqlens, dt_softplus, *dt_limit, True, chunk)

    return call


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("chunk", [None, 16, 64])
def test_float64_meets_golden(golden, name, chunk):
    g = golden(name)
    leaves = {key: g[key].clone().requires_grad_() for key in TENSORS}
    options = {"dt_softplus": True, "dt_limit": tuple(g["dt_limit"].tolist()), "return_final_states": True}
    call = ssd if chunk is None else in_chunks(chunk)
    out, last = call(**leaves, **options, backend="reference")
    gradients = torch.autograd.grad((out * g["w"]).sum() + (last * g["w_state"]).sum(), list(leaves.values()))
    expected = {"out": out.detach(), "last_state": last.detach()} | {
        f"grad_{key}": gradient for key, gradient in zip(leaves, gradients, strict=True)
    }
    for key, value in expected.items():
        assert (value - g[key]).norm() <= 1e-11 * g[key].norm(), key


@pytest.mark.parametrize("wide_skip", [False, True])
def test_reference_is_the_definition(wide_skip):
    inputs = random_inputs(2, 6, 4, 3, 2, 5, wide_skip=wide_skip)
    out, last = ssd(**inputs, dt_limit=(0.1, 1.5), return_final_states=True, backend="reference")
    B, C = (inputs[name].repeat_interleave(2, 2) for name in "BC")
    D = inputs["D"] if wide_skip else inputs["D"][:, None].expand(4, 3)
    step = (inputs["dt"] + inputs["dt_bias"]).clamp(0.1, 1.5)
    for b, h in itertools.product(range(2), range(4)):
        S = inputs["initial_states"][b, h]
        for t in range(6):
            x = inputs["x"][b, t, h]
            S = torch.exp(step[b, t, h] * inputs["A"][h]) * S + step[b, t, h] * torch.outer(x, B[b, t, h])
            torch.testing.assert_close(out[b, t, h], (S @ C[b, t, h] + D[h] * x) * silu(inputs["z"][b, t, h]))
        torch.testing.assert_close(last[b, h], S)


def test_reference_gradients_are_the_derivatives():
    inputs = random_inputs(1, 5, 2, 2, 1, 3)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def call(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        return ssd(**named, dt_softplus=True, seq_idx=numbered(5, [2]), return_final_states=True, backend="reference")

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("backend", ["reference", None])
def test_packed_sequences_are_the_sequences_one_by_one(backend):
    bounds = [0, 7, 7, 12, 33]
    inputs = random_inputs(1, 33, 4, 3, 2, 5, sequences=4)
    out, last = ssd(
        **inputs, dt_softplus=True, return_final_states=True, cu_seqlens=torch.tensor(bounds), backend=backend
    )
    for i, (first, stop) in enumerate(itertools.pairwise(bounds)):
        piece = {k: t[:, first:stop] if k in ("x", "dt", "B", "C", "z") else t for k, t in inputs.items()}
        piece["initial_states"] = inputs["initial_states"][i : i + 1]
        alone, end = ssd(**piece, dt_softplus=True, return_final_states=True, backend=backend)
        torch.testing.assert_close(out[:, first:stop], alone)
        torch.testing.assert_close(last[i : i + 1], end)


def test_numbered_sequences_are_the_sequences_one_by_one():
    inputs = random_inputs(1, 20, 2, 3, 1, 4)
    out, last = ssd(**inputs, dt_softplus=True, return_final_states=True, seq_idx=numbered(20, [0, 5, 6, 17]))
    pieces = [(0, 5), (5, 6), (6, 17), (17, 20)]
    for first, stop in pieces:
        piece = {k: t[:, first:stop] if k in ("x", "dt", "B", "C", "z") else t for k, t in inputs.items()}
        if first > 0:
            piece["initial_states"] = None
        alone, end = ssd(**piece, dt_softplus=True, return_final_states=True)
        torch.testing.assert_close(out[:, first:stop], alone)
    torch.testing.assert_close(last, end)


SIZES = [(2, 33, 4, 3, 2, 5), (1, 1, 3, 16, 3, 13), (1, 130, 2, 5, 1, 1), (2, 64, 2, 17, 1, 100)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_chunks_agree_with_the_reference(assert_close, sizes, chunk):
    inputs = random_inputs(*sizes)
    options = {"dt_limit": (0.01, 1.0)}
    oracle = evaluate(inputs, torch.float64, "reference", **options)
    check(evaluate(inputs, torch.float64, None, call=in_chunks(chunk), **options), oracle, assert_close, torch.float64)


NUMBERED = [([0, 5, 6, 17], [3]), ([16], [8, 16, 24]), ([], range(40)), ([39], [1, 38])]


@pytest.mark.parametrize("starts", NUMBERED, ids=str)
@pytest.mark.parametrize("chunk", [8, 16, 64])
def test_chunks_of_numbered_sequences(assert_close, starts, chunk):
    inputs = random_inputs(2, 40, 2, 3, 1, 5, without=["D", "z"])
    options = {"seq_idx": numbered(40, *starts)}
    oracle = evaluate(inputs, torch.float64, "reference", **options)
    check(evaluate(inputs, torch.float64, None, call=in_chunks(chunk), **options), oracle, assert_close, torch.float64)


@pytest.mark.parametrize("bounds", [[0, 7, 7, 24, 40], [0, 0, 33, 33], [0, 16, 32]], ids=str)
@pytest.mark.parametrize("chunk", [8, 64])
def test_chunks_of_packed_sequences(assert_close, bounds, chunk):
    inputs = random_inputs(1, bounds[-1], 2, 3, 1, 5, sequences=len(bounds) - 1)
    options = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    oracle = evaluate(inputs, torch.float64, "reference", **options)
    check(evaluate(inputs, torch.float64, None, call=in_chunks(chunk), **options), oracle, assert_close, torch.float64)


def published(X, A, B, C, block, initial):
    """(Y, final state) of the published minimal form, for X = step x (b, l, h, p), A = step A (b, l, h), B and C of heads."""

    def segment_sums(a):
        count = a.shape[-1]
        below = torch.ones(count, count, dtype=torch.bool)
        sums = a[..., None].expand(*a.shape, count).masked_fill(~below.tril(-1), 0).cumsum(-2)
        return sums.masked_fill(~below.tril(), -torch.inf)

    X, A, B, C = (t.unflatten(1, (-1, block)) for t in (X, A, B, C))
    A = A.permute(0, 3, 1, 2)
    sums = A.cumsum(-1)
    diagonal = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, segment_sums(A).exp(), X)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, (sums[..., -1:] - sums).exp(), X)
    states = torch.cat([initial[:, None], states], 1)
    between = segment_sums(torch.nn.functional.pad(sums[..., -1], (1, 0))).exp()
    states = torch.einsum("bhzc,bchpn->bzhpn", between, states)
    behind = torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states[:, :-1], sums.exp())
    return (diagonal + behind).flatten(1, 2), states[:, -1]


@pytest.mark.parametrize("block", [8, 16, 64])
def test_the_published_minimal_form_agrees(block):
    inputs = random_inputs(2, 64, 4, 3, 1, 5, without=["D", "z"])
    step = softplus(inputs["dt"] + inputs["dt_bias"])
    B, C = (inputs[name].expand(2, 64, 4, 5) for name in "BC")
    Y, final = published(step[..., None] * inputs["x"], step * inputs["A"], B, C, block, inputs["initial_states"])
    options = {"dt_softplus": True, "return_final_states": True}
    for out, last in (ssd(**inputs, **options), in_chunks(block)(**inputs, **options, backend=None)):
        torch.testing.assert_close(out, Y, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(last, final, rtol=1e-11, atol=1e-11)


WRONG = {
    "x": [("x", lambda t: t[0]), ("x", lambda t: t.long())],
    "A": [("A", lambda t: t[:1]), ("A", lambda t: t.cfloat()), ("A", lambda t: t.neg()), ("A", lambda t: t * torch.nan)],
    "B": [
        ("B", lambda t: t[..., 1:]), ("B", lambda t: t.repeat(1, 1, 2, 1)), ("B", lambda t: t[:, :, :0]), ("B", lambda t: t[0]),
        ("B", lambda t: t[:, 1:]),
    ],
    "C": [("C", lambda t: t[:, :, 1:]), ("C", lambda t: t[..., 1:]), ("C", lambda t: t.long())],
    "others": [
        ("dt", lambda t: t[:, :1]),
        ("dt", lambda t: t.cfloat()),
        ("D", lambda t: t[1:]),
        ("D", lambda t: t[:, None]),
        ("z", lambda t: t[..., 1:]),
        ("dt_bias", lambda t: t[1:]),
        ("initial_states", lambda t: t[:1]),
        ("initial_states", lambda t: t.mT),
        ("D", lambda t: t.to("meta")),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "wrong"), [case for cases in WRONG.values() for case in cases])
def test_wrong_tensors_are_named(name, wrong):
    inputs = random_inputs(2, 6, 4, 3, 2, 5)
    inputs[name] = wrong(inputs[name])
    with pytest.raises(ArgumentError, match=rf"^{'[BC]' if name == 'B' else name}: expected"):
        ssd(**inputs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chunk_size", 0), ("chunk_size", 2.5), ("chunk_size", True), ("dt_limit", (1.0, 0.5)), ("dt_limit", (0.0, math.nan)),
        ("dt_limit", 3.0), ("dt_limit", (1.0,)), ("dt_limit", ("a", "b")), ("dt_limit", (math.inf, math.inf)),
        ("chunk_size", 2**31), ("chunk_size", 2**70),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(name, value):
    with pytest.raises(ArgumentError, match=rf"^{name}: expected"):
        ssd(**random_inputs(), **{name: value})


@pytest.mark.parametrize(
    "numbers", [[[0, 0, 1, 1], [0, 1, 0, 1]], [[0, 1, 2, 3]], [[0.0] * 4] * 2, [[[0]] * 4] * 2], ids=str
)
def test_wrong_seq_idx(numbers):
    with pytest.raises(ArgumentError, match=r"^seq_idx: expected"):
        ssd(**random_inputs(2, 4), seq_idx=torch.tensor(numbers))


@pytest.mark.parametrize("bounds", [[0, 4], [1, 6], [0, 5, 3, 6], [0], [[0, 6]], [0.0, 6.0], [0, 7]], ids=str)
def test_wrong_cu_seqlens(bounds):
    with pytest.raises(ArgumentError, match=r"^cu_seqlens: expected"):
        ssd(**random_inputs(1, 6, without=["initial_states"]), cu_seqlens=torch.tensor(bounds))


def test_packing_needs_a_batch_of_one_and_one_way_of_saying_it():
    inputs = random_inputs(2, 6, without=["initial_states"])
    with pytest.raises(ArgumentError, match="batch of 1"):
        ssd(**inputs, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ArgumentError, match="one of the two"):
        ssd(**random_inputs(1, 6), cu_seqlens=torch.tensor([0, 6]), seq_idx=torch.zeros(1, 6, dtype=torch.int32))


@pytest.mark.parametrize("bounds", [None, [0, 2, 6]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_chunk_beyond_the_sequence_takes_no_more_memory(bounds, dtype):
    inputs = {name: t if t is None else t.to(dtype) for name, t in random_inputs(1, 6, without=["initial_states"]).items()}
    options = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds)}
    arguments = *inputs.values(), None, options.get("cu_seqlens"), True, 0.0, math.inf, True, 1.0, 2**62
    out, _ = ssd_op(*arguments, "cpp" if dtype == torch.float32 else "chunked")
    torch.testing.assert_close(out, ssd(**inputs, dt_softplus=True, backend="reference", **options), rtol=1e-4, atol=1e-5)


def test_unknown_backend():
    with pytest.raises(BackendError, match="got 'cuda'"):
        ssd(**random_inputs(), backend="cuda")


EMPTY = [(0, 6, 4, 3, 2, 5), (2, 0, 4, 3, 2, 5), (2, 6, 0, 3, 2, 5), (2, 6, 4, 0, 2, 5), (2, 6, 4, 3, 2, 0)]


@pytest.mark.parametrize("sizes", EMPTY, ids=["batch", "L", "H", "P", "N"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_empty(sizes, backend, assert_close):
    batch, length, heads, channels, _, states = sizes
    inputs = random_inputs(*sizes)
    results = evaluate(inputs, torch.float32, backend)
    assert results["out"].shape == (batch, length, heads, channels)
    assert results["last"].shape == (batch, heads, channels, states)
    if length == 0:
        check({"last": results["last"]}, {"last": inputs["initial_states"]}, assert_close, torch.float32)
    if states == 0:
        gated = inputs["D"][:, None] * inputs["x"] * silu(inputs["z"])
        check({"out": results["out"]}, {"out": gated}, assert_close, torch.float32)


def test_the_chunk_shrinks_with_the_states():
    lengths = [chunk_length(states, 64, 1024) for states in (1, 16, 32, 64, 128, 300)]
    assert lengths == sorted(lengths)
    assert lengths[0] == LEAST
    assert lengths[1] < lengths[4] <= MOST
    assert chunk_length(128, 64, 5) == 5
    assert chunk_length(128, 64, 0) == 1
    shapes = {"x": (2, 1024, 8, 64), "B": (2, 1024, 1, 128)}
    assert plan("ssd", shapes).get("chunk") == chunk_length(128, 64, 1024)
    assert plan("ssd", shapes, torch.float64).form == "scan"
    with pytest.raises(ArgumentError, match="G dividing H"):
        plan("ssd", {**shapes, "B": (2, 1024, 3, 128)})


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("packed", [False, True])
def test_custom_op_is_well_formed(packed, backend):
    inputs = random_inputs(1, 20, 2, 3, 1, 4, sequences=3 if packed else 1)
    arguments = [t.float().requires_grad_() for t in inputs.values()]
    bounds = torch.tensor([0, 3, 3, 20]) if packed else None
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    settings = (True, 0.0, math.inf, True, 1.0, 0, backend)
    torch.library.opcheck(ssd_op.op, (*arguments, None, bounds, *settings), test_utils=tests)


@pytest.mark.parametrize("backend", ["reference", None])
def test_compiles_into_one_graph(assert_close, backend):
    inputs = random_inputs(2, 17, 2, 3, 1, 4)
    compiled = torch.compile(ssd, fullgraph=True, backend="aot_eager")
    oracle = evaluate(inputs, torch.float64, "reference")
    check(evaluate(inputs, torch.float32, backend, call=compiled), oracle, assert_close, torch.float32)
