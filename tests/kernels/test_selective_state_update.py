"""The decode step: equal to the steps of the selective scan, in place; what bad input gets."""

from __future__ import annotations

import pytest
import torch
from kernels.selective_scan_cases import random_inputs

from compressm.errors import ArgumentError, BackendError
from compressm.kernels import selective_scan, selective_state_update


def step(inputs, state, t, dtype=torch.float64, **options):
    """Feed step t of the scan's inputs to the decode step."""
    x, dt, z = (None if inputs[name] is None else inputs[name][..., t].to(dtype) for name in ("u", "delta", "z"))
    B, C = (inputs[name][..., t].to(dtype) for name in ("B", "C"))
    return selective_state_update(state, x, dt, inputs["A"], B, C, inputs["D"], z, inputs["delta_bias"], **options)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("without", [(), ("D", "z", "delta_bias")], ids=["all", "bare"])
def test_steps_are_the_scan(groups, without):
    inputs = random_inputs(2, 6, 9, 5, groups, without=without)
    out, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    state = inputs["initial_state"].clone()
    for t in range(9):
        torch.testing.assert_close(step(inputs, state, t, dt_softplus=True), out[..., t])
    torch.testing.assert_close(state, last)


def test_one_group_may_go_without_its_axis():
    inputs = random_inputs(2, 6, 1, 5)
    a, b = inputs["initial_state"].clone(), inputs["initial_state"].clone()
    B, C = inputs["B"][:, 0, :, 0], inputs["C"][:, 0, :, 0]
    out = selective_state_update(a, inputs["u"][..., 0], inputs["delta"][..., 0], inputs["A"], B, C)
    same = selective_state_update(b, inputs["u"][..., 0], inputs["delta"][..., 0], inputs["A"], B[:, None], C[:, None])
    assert torch.equal(out, same)
    assert torch.equal(a, b)


def test_it_is_differentiable_where_a_gradient_is_asked_for():
    inputs = random_inputs(2, 3, 1, 4)
    x = inputs["u"][..., 0].requires_grad_()

    def call(x):
        state = inputs["initial_state"].clone()
        out = selective_state_update(
            state, x, inputs["delta"][..., 0], inputs["A"], inputs["B"][..., 0], inputs["C"][..., 0]
        )
        return out, state

    assert torch.autograd.gradcheck(call, x)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("state", lambda t: t[0]),
        ("x", lambda t: t[:1]),
        ("dt", lambda t: t[:, :1]),
        ("A", lambda t: t[1:]),
        ("B", lambda t: t[:, :, 1:]),
        ("B", lambda t: t.repeat(1, 2, 1)),
        ("C", lambda t: t.long()),
        ("D", lambda t: t[1:]),
        ("z", lambda t: t.to("meta")),
        ("dt_bias", lambda t: t[1:]),
    ],
)
def test_wrong_tensors_are_named(name, wrong):
    inputs = random_inputs(2, 3, 1, 4)
    arguments = {
        "state": inputs["initial_state"],
        "x": inputs["u"][..., 0],
        "dt": inputs["delta"][..., 0],
        "A": inputs["A"],
        "B": inputs["B"][..., 0],
        "C": inputs["C"][..., 0],
        "D": inputs["D"],
        "z": inputs["z"][..., 0],
        "dt_bias": inputs["delta_bias"],
    }
    arguments[name] = wrong(arguments[name])
    with pytest.raises(ArgumentError, match=rf"^{name}: expected"):
        selective_state_update(**arguments)


def test_unknown_backend():
    inputs = random_inputs(2, 3, 1, 4)
    with pytest.raises(BackendError, match="expected one of cpp, reference, triton"):
        step(inputs, inputs["initial_state"], 0, backend="cuda")


def test_empty_batch():
    inputs = random_inputs(0, 3, 1, 4)
    assert step(inputs, inputs["initial_state"], 0).shape == (0, 3)
