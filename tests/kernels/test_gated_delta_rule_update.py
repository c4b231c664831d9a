"""The decode step of the gated delta rule: equal to the steps of the rule, in place, on rows of a pool; what bad input gets."""

from __future__ import annotations

import pytest
import torch
from kernels.gated_delta_rule_cases import random_inputs

from compressm.errors import ArgumentError, BackendError
from compressm.kernels import gated_delta_rule, gated_delta_rule_update, plan

NAMES = ("q", "k", "v", "g", "beta")


def token(inputs, t, dtype=torch.float64):
    """Step t of the inputs of the rule."""
    return {name: inputs[name][:, t].to(dtype) for name in NAMES}


@pytest.mark.parametrize("channelwise", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_steps_are_the_rule(channelwise, normalize):
    inputs = random_inputs(2, 9, 2, 4, 5, 3, channelwise=channelwise)
    options = {"scale": 0.7, "use_qk_l2norm_in_kernel": normalize}
    o, last = gated_delta_rule(**inputs, **options, output_final_state=True)
    state = inputs["initial_state"].clone()
    for t in range(9):
        torch.testing.assert_close(gated_delta_rule_update(state, **token(inputs, t), **options), o[:, t])
    torch.testing.assert_close(state, last)


SIZES = [(3, 1, 2, 4, 5, 7), (1, 1, 1, 1, 1, 1), (2, 1, 3, 3, 100, 70), (2, 1, 1, 2, 13, 80)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("channelwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpp_agrees_with_the_reference_on_every_instruction_set(assert_close, sizes, channelwise, dtype, isa):
    inputs = random_inputs(*sizes, channelwise=channelwise)
    given = token(inputs, 0, dtype)
    exact, state = (inputs["initial_state"].to(t) for t in (torch.float64, torch.float32))
    expected = gated_delta_rule_update(exact, **{name: t.double() for name, t in given.items()}, use_qk_l2norm_in_kernel=True)
    o = gated_delta_rule_update(state, **given, use_qk_l2norm_in_kernel=True, backend="cpp")
    assert o.dtype == dtype
    assert_close(o, expected, "o")
    assert_close(state, exact, "state")


@pytest.mark.parametrize(("sizes", "channelwise"), [((2, 1, 2, 4, 5, 7), False), ((1, 1, 1, 1, 150, 70), True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [False, True])
def test_triton_agrees_with_the_reference(assert_close, sizes, channelwise, dtype, normalize, device):
    inputs = random_inputs(*sizes, channelwise=channelwise)
    given = token(inputs, 0, dtype)
    exact, state = inputs["initial_state"].clone(), inputs["initial_state"].to(device, torch.float32)
    options = {"scale": 0.7, "use_qk_l2norm_in_kernel": normalize}
    expected = gated_delta_rule_update(exact, **{name: t.double() for name, t in given.items()}, **options)
    o = gated_delta_rule_update(state, **{name: t.to(device) for name, t in given.items()}, **options, backend="triton")
    assert o.dtype == dtype
    assert_close(o.cpu(), expected, "o")
    assert_close(state.cpu(), exact, "state")


@pytest.mark.parametrize("backend", ["cpp", "reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moved", [False, True])
def test_rows_of_a_pool(backend, dtype, moved):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter runs on CPU tensors where there is no GPU")
    inputs = random_inputs(4, 1, 1, 2, 5, 3)
    pool = torch.randn(7, 2, 5, 3).to(dtype)
    rows = torch.tensor([5, -1, 0, 3], dtype=torch.int32)
    targets = torch.tensor([1, 2, 0, 6]) if moved else None
    expected, new = pool.clone(), []
    for i, row in enumerate(rows.tolist()):
        state = pool[row : row + 1].float().clone() if row >= 0 else torch.zeros(1, 2, 5, 3)
        o = gated_delta_rule_update(state, **{name: t[i : i + 1] for name, t in token(inputs, 0, torch.float32).items()})
        new.append(o if row >= 0 else torch.zeros_like(o))
        if row >= 0:
            expected[(targets if moved else rows)[i]] = state[0].to(dtype)
    out = gated_delta_rule_update(
        pool, **token(inputs, 0, torch.float32), state_batch_indices=rows, dst_state_batch_indices=targets, backend=backend
    )
    torch.testing.assert_close(out, torch.cat(new))
    torch.testing.assert_close(pool, expected)


def test_strided_states_and_the_backend_that_runs(cpp_calls):
    inputs = random_inputs(2, 1, 1, 2, 5, 3)
    given = token(inputs, 0, torch.float32)
    dense, wide = inputs["initial_state"].float(), torch.full((2, 2, 5, 6), torch.nan)
    wide[..., ::2] = dense
    with cpp_calls() as seen:
        expected = gated_delta_rule_update(dense, **given)
    assert seen == {"gated_delta_rule_step": 1}
    torch.testing.assert_close(gated_delta_rule_update(wide[..., ::2], **given), expected)
    torch.testing.assert_close(wide[..., ::2], dense)
    assert wide[..., 1::2].isnan().all()
    assert plan("gated_delta_rule_update", {"state": (2, 2, 5, 3), "k": (2, 1, 5)}).backend == "cpp"
    with pytest.raises(ArgumentError, match="H dividing HV"):
        plan("gated_delta_rule_update", {"state": (2, 2, 5, 3), "k": (2, 3, 5)})


def test_it_is_differentiable_where_a_gradient_is_asked_for():
    inputs = random_inputs(2, 1, 1, 2, 3, 2)
    leaves = [inputs["initial_state"].requires_grad_(), *(t.requires_grad_() for t in token(inputs, 0).values())]

    def call(state, *tensors):
        state = state.clone()
        return gated_delta_rule_update(state, *tensors, use_qk_l2norm_in_kernel=True), state

    assert torch.autograd.gradcheck(call, leaves)
    with pytest.raises(BackendError, match="has no backward"):
        gated_delta_rule_update(leaves[0].clone(), *leaves[1:], backend="cpp")


WRONG = {
    "state": [lambda t: t[0], lambda t: t[:1], lambda t: t.long()],
    "q": [lambda t: t[0], lambda t: t.repeat(1, 3, 1), lambda t: t[..., 1:], lambda t: t[:, :0]],
    "k": [lambda t: t[:, 1:], lambda t: t.long()],
    "v": [lambda t: t[:, 1:], lambda t: t[..., 1:], lambda t: t.to("meta")],
    "g": [lambda t: t[:, 1:], lambda t: t[..., None]],
    "beta": [lambda t: t[:1], lambda t: t.bool()],
}


@pytest.mark.parametrize(("name", "wrong"), [(name, wrong) for name, cases in WRONG.items() for wrong in cases])
def test_wrong_tensors_are_named(name, wrong):
    inputs = random_inputs(2, 1, 2, 4, 5, 3)
    arguments = {"state": inputs["initial_state"], **token(inputs, 0)}
    arguments[name] = wrong(arguments[name])
    with pytest.raises(ArgumentError, match=rf"^{name}: expected"):
        gated_delta_rule_update(**arguments)


def test_wrong_rows_and_settings_are_named():
    inputs = random_inputs(2, 1, 2, 4, 5, 3)
    arguments = {"state": inputs["initial_state"], **token(inputs, 0)}
    with pytest.raises(ArgumentError, match=r"^state_batch_indices: expected rows of a pool of 2"):
        gated_delta_rule_update(**arguments, state_batch_indices=torch.tensor([0, 2]))
    with pytest.raises(ArgumentError, match=r"^dst_state_batch_indices: expected"):
        gated_delta_rule_update(**arguments, dst_state_batch_indices=torch.tensor([0.0, 1.0]))
    with pytest.raises(ArgumentError, match=r"^scale: expected"):
        gated_delta_rule_update(**arguments, scale="half")


@pytest.mark.parametrize("sizes", [(0, 1, 2, 4, 5, 3), (2, 1, 2, 0, 5, 3), (2, 1, 2, 4, 0, 3), (2, 1, 2, 4, 5, 0)], ids=str)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_empty(sizes, backend):
    inputs = random_inputs(*sizes)
    o = gated_delta_rule_update(inputs["initial_state"].float(), **token(inputs, 0, torch.float32), backend=backend)
    assert o.shape == (sizes[0], sizes[3], sizes[5])
    assert not o.any()
