"""The gated delta rule: the reference against the definition and the golden files, torch in chunks against it; wrong input."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernels.evaluation import check
from kernels.gated_delta_rule_cases import GOLDEN, TENSORS, evaluate, mixed_decays, random_inputs

from compressm.errors import ArgumentError, BackendError
from compressm.kernels import gated_delta_rule, plan
from compressm.kernels.gated_delta_rule import chunked
from compressm.kernels.gated_delta_rule.form import LEAST, MOST, chunk_length
from compressm.kernels.gated_delta_rule.op import gated_delta_rule_op


def in_chunks(chunk):
    """gated_delta_rule by torch's own products in chunks of this many steps, whatever the dtype."""

    def call(*, backend, output_final_state, scale=None, use_qk_l2norm_in_kernel=False, cu_seqlens=None, **tensors):
        given = [tensors[name] for name in TENSORS]
        return chunked.gated_delta_rule(*given, cu_seqlens, scale, use_qk_l2norm_in_kernel, chunk)

    return call


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("chunk", [None, 16, 64])
def test_float64_meets_golden(golden, name, chunk):
    g = golden(name)
    leaves = {key: g[key].clone().requires_grad_() for key in TENSORS}
    call = gated_delta_rule if chunk is None else in_chunks(chunk)
    o, last = call(**leaves, scale=g["scale"].item(), output_final_state=True, backend="reference")
    gradients = torch.autograd.grad((o * g["w"]).sum() + (last * g["w_state"]).sum(), list(leaves.values()))
    expected = {"out": o.detach(), "last_state": last.detach()} | {
        f"grad_{key}": gradient for key, gradient in zip(leaves, gradients, strict=True)
    }
    for key, value in expected.items():
        assert (value - g[key]).norm() <= 1e-11 * g[key].norm(), key


@pytest.mark.parametrize("channelwise", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_reference_is_the_definition(channelwise, normalize):
    inputs = random_inputs(2, 6, 2, 4, 5, 3, channelwise=channelwise)
    o, last = gated_delta_rule(
        **inputs, use_qk_l2norm_in_kernel=normalize, output_final_state=True, backend="reference", scale=0.7
    )
    for b, h in itertools.product(range(2), range(4)):
        S = inputs["initial_state"][b, h]
        for t in range(6):
            q, k, v = inputs["q"][b, t, h // 2], inputs["k"][b, t, h // 2], inputs["v"][b, t, h]
            if normalize:
                q, k = (x / (x @ x + 1e-6).sqrt() for x in (q, k))
            decay = inputs["g"][b, t, h].exp()
            S = (decay[:, None] if channelwise else decay) * S
            S = (torch.eye(5) - inputs["beta"][b, t, h] * torch.outer(k, k)) @ S + inputs["beta"][b, t, h] * torch.outer(k, v)
            torch.testing.assert_close(o[b, t, h], 0.7 * S.T @ q)
        torch.testing.assert_close(last[b, h], S)


@pytest.mark.parametrize("channelwise", [False, True])
@pytest.mark.parametrize("call", [gated_delta_rule, in_chunks(4)], ids=["reference", "chunks"])
def test_gradients_are_the_derivatives(channelwise, call):
    inputs = random_inputs(1, 6, 1, 2, 3, 2, channelwise=channelwise)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def function(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        return call(**named, use_qk_l2norm_in_kernel=True, output_final_state=True, backend="reference")

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", ["reference", None])
def test_packed_sequences_are_the_sequences_one_by_one(backend):
    bounds = [0, 7, 7, 12, 33]
    inputs = random_inputs(1, 33, 2, 4, 3, 5, sequences=4)
    o, last = gated_delta_rule(**inputs, output_final_state=True, cu_seqlens=torch.tensor(bounds), backend=backend)
    for i, (first, stop) in enumerate(itertools.pairwise(bounds)):
        piece = {k: t[:, first:stop] for k, t in inputs.items()}
        piece["initial_state"] = inputs["initial_state"][i : i + 1]
        alone, end = gated_delta_rule(**piece, output_final_state=True, backend=backend)
        torch.testing.assert_close(o[:, first:stop], alone)
        torch.testing.assert_close(last[i : i + 1], end)


SIZES = [(2, 33, 2, 4, 5, 3), (1, 1, 3, 3, 13, 7), (1, 65, 1, 2, 1, 5), (2, 64, 1, 1, 40, 17)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("channelwise", [False, True])
def test_chunks_agree_with_the_reference(assert_close, sizes, chunk, channelwise):
    inputs = random_inputs(*sizes, channelwise=channelwise)
    oracle = evaluate(inputs, torch.float64, "reference")
    check(evaluate(inputs, torch.float64, None, call=in_chunks(chunk)), oracle, assert_close, torch.float64)


@pytest.mark.parametrize("bounds", [[0, 7, 7, 24, 40], [0, 0, 33, 33], [0, 16, 32]], ids=str)
@pytest.mark.parametrize("chunk", [8, 64])
def test_chunks_of_packed_sequences(assert_close, bounds, chunk):
    inputs = random_inputs(1, bounds[-1], 1, 2, 5, 3, sequences=len(bounds) - 1)
    options = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    oracle = evaluate(inputs, torch.float64, "reference", **options)
    check(evaluate(inputs, torch.float64, None, call=in_chunks(chunk), **options), oracle, assert_close, torch.float64)


@pytest.mark.parametrize("channelwise", [False, True])
@pytest.mark.parametrize("decay", [1e-4, 20.0, None])
def test_decays_of_all_sizes_in_float32(assert_close, channelwise, decay):
    inputs = random_inputs(2, 70, 2, 2, 9, 5, channelwise=channelwise, decay=decay or 1.0)
    inputs = mixed_decays(inputs) if decay is None else inputs
    inputs = {name: tensor.float().double() for name, tensor in inputs.items()}
    oracle = evaluate(inputs, torch.float64, "reference")
    check(evaluate(inputs, torch.float32, None, call=in_chunks(64)), oracle, assert_close, torch.float32)


WRONG = {
    "q": [lambda t: t[0], lambda t: t.long(), lambda t: t[:, :, :0], lambda t: t.repeat(1, 1, 3, 1)],
    "k": [lambda t: t[:, :1], lambda t: t[:, :, 1:], lambda t: t[..., 1:], lambda t: t.long(), lambda t: t.to("meta")],
    "v": [lambda t: t[0], lambda t: t[:, 1:], lambda t: t[:1], lambda t: t.cfloat(), lambda t: t.to("meta")],
    "g": [lambda t: t[..., 1:], lambda t: t[:, 1:], lambda t: t[..., None].expand(2, 6, 4, 3), lambda t: t.long()],
    "beta": [lambda t: t[..., :2], lambda t: t[..., None], lambda t: t.bool()],
    "initial_state": [lambda t: t[:1], lambda t: t.mT, lambda t: t[:, 1:], lambda t: t.cfloat()],
}


@pytest.mark.parametrize(("name", "wrong"), [(name, wrong) for name, cases in WRONG.items() for wrong in cases])
def test_wrong_tensors_are_named(name, wrong):
    inputs = random_inputs(2, 6, 2, 4, 5, 3)
    inputs[name] = wrong(inputs[name])
    with pytest.raises(ArgumentError, match=rf"^{name}: expected"):
        gated_delta_rule(**inputs)


@pytest.mark.parametrize(
    ("name", "value"), [("chunk_size", 0), ("chunk_size", 2.5), ("chunk_size", True), ("scale", "half"), ("scale", True)]
)
def test_wrong_settings_are_named(name, value):
    with pytest.raises(ArgumentError, match=rf"^{name}: expected"):
        gated_delta_rule(**random_inputs(), **{name: value})


@pytest.mark.parametrize("bounds", [[0, 4], [1, 6], [0, 5, 3, 6], [0], [[0, 6]], [0.0, 6.0], [0, 7]], ids=str)
def test_wrong_cu_seqlens(bounds):
    with pytest.raises(ArgumentError, match=r"^cu_seqlens: expected"):
        gated_delta_rule(**random_inputs(1, 6, state=False), cu_seqlens=torch.tensor(bounds))


def test_packing_needs_a_batch_of_one_and_bounds_where_q_is():
    with pytest.raises(ArgumentError, match=r"^q: expected a batch of 1"):
        gated_delta_rule(**random_inputs(2, 6, state=False), cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ArgumentError, match=r"^cu_seqlens: expected cpu"):
        gated_delta_rule(**random_inputs(1, 6, state=False), cu_seqlens=torch.tensor([0, 6], device="meta"))


def test_unknown_backend():
    with pytest.raises(BackendError, match="got 'cuda'"):
        gated_delta_rule(**random_inputs(), backend="cuda")


EMPTY = [(0, 6, 2, 4, 5, 3), (2, 0, 2, 4, 5, 3), (2, 6, 2, 0, 5, 3), (2, 6, 2, 4, 5, 0), (2, 6, 2, 4, 0, 3)]


@pytest.mark.parametrize("sizes", EMPTY, ids=["batch", "L", "HV", "V", "K"])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("channelwise", [False, True])
def test_empty(sizes, backend, channelwise, assert_close):
    batch, length, _, heads, keys, values = sizes
    inputs = random_inputs(*sizes, channelwise=channelwise)
    results = evaluate(inputs, torch.float32, backend)
    assert results["o"].shape == (batch, length, heads, values)
    assert results["last"].shape == (batch, heads, keys, values)
    if length == 0:
        check({"last": results["last"]}, {"last": inputs["initial_state"]}, assert_close, torch.float32)
    if keys == 0:
        assert not results["o"].any()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_final_states_are_returned_where_asked_for_and_nan_passes_through(backend):
    inputs = {name: tensor.float() for name, tensor in random_inputs(1, 40, 1, 2, 5, 3).items()}
    inputs["v"][0, 20, 1, 0] = torch.nan
    o, last = gated_delta_rule(**inputs, output_final_state=True, backend=backend)
    assert gated_delta_rule(**inputs, backend=backend)[1] is None
    for result in (o[0, 20:].transpose(0, 1), last[0]):
        assert result[1, ..., 0].isnan().all()
        assert result[1, ..., 1:].isfinite().all()
        assert result[0].isfinite().all()


def test_the_chunk_shrinks_with_the_keys():
    lengths = [chunk_length(keys, 128, 1024) for keys in (1, 16, 32, 64, 128, 300)]
    assert lengths == sorted(lengths)
    assert lengths[0] == LEAST
    assert lengths[1] < lengths[4] <= MOST
    assert chunk_length(128, 64, 5) == 5
    assert chunk_length(128, 64, 0) == 1
    shapes = {"k": (2, 1024, 2, 128), "v": (2, 1024, 4, 64)}
    assert plan("gated_delta_rule", shapes).get("chunk") == chunk_length(128, 64, 1024)
    assert plan("gated_delta_rule", shapes, torch.float64).form == "scan"
    with pytest.raises(ArgumentError, match="H dividing HV"):
        plan("gated_delta_rule", {**shapes, "k": (2, 1024, 3, 128)})


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("packed", [False, True])
def test_custom_op_is_well_formed(packed, backend):
    inputs = random_inputs(1, 20, 1, 2, 4, 3, sequences=3 if packed else 1)
    arguments = [t.float().requires_grad_() for t in inputs.values()]
    bounds = torch.tensor([0, 3, 3, 20]) if packed else None
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    torch.library.opcheck(gated_delta_rule_op.op, (*arguments, bounds, None, packed, 0, backend), test_utils=tests)


@pytest.mark.parametrize("backend", ["reference", None])
def test_compiles_into_one_graph(assert_close, backend):
    inputs = random_inputs(2, 17, 1, 2, 4, 3)
    compiled = torch.compile(gated_delta_rule, fullgraph=True, backend="aot_eager")
    oracle = evaluate(inputs, torch.float64, "reference")
    check(evaluate(inputs, torch.float32, backend, call=compiled), oracle, assert_close, torch.float32)
