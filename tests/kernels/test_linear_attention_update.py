"""The decode step of linear attention in Triton, on a GPU or in the interpreter, against the definition; what runs where."""

from __future__ import annotations

import pytest
import torch
from kernels.linear_attention_cases import random_inputs

from compressm.errors import ArgumentError, BackendError
from compressm.kernels import linear_attention, linear_attention_update, plan


def token(inputs, t=0):
    """Step t of the inputs of linear attention, but for the state."""
    return {name: g if name == "g" and (g is None or g.dim() == 1) else g[:, t] for name, g in inputs.items() if name in "qkvg"}


CASES = [
    ((2, 1, 2, 4, 5, 7), "channel", False), ((1, 1, 1, 1, 150, 70), "channel", True), ((2, 1, 1, 2, 13, 3), "scalar", True),
    ((3, 1, 1, 2, 5, 3), "fixed", False), ((2, 1, 2, 2, 16, 8), "none", True),
]  # fmt: skip


@pytest.mark.parametrize(("sizes", "decay", "normalize"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_agrees_with_a_step_of_linear_attention(assert_close, sizes, decay, normalize, dtype, device):
    inputs = random_inputs(*sizes, decay=decay, normalize=normalize)
    given = {name: None if t is None else t.to(dtype) for name, t in inputs.items() if name in "qkvg"}
    state = inputs["initial_state"].to(device, torch.float32)
    exact = {name: None if t is None else t.double() for name, t in given.items()} | {"initial_state": state.double().cpu()}
    options = {"scale": 0.7, "normalize": normalize}
    expected, last = linear_attention(**exact, **options, output_final_state=True, backend="reference")
    step = {name: None if t is None else t.to(device) for name, t in token(given).items()}
    out = linear_attention_update(state, **step, **options, backend="triton")
    assert out.dtype == dtype
    assert_close(out.cpu(), expected[:, 0], "out")
    assert_close(state.cpu(), last, "state")


def test_strided_states_in_half_precision(device):
    inputs = random_inputs(2, 1, 1, 2, 5, 3, decay="scalar")
    step = {name: t.to(device, torch.float32) for name, t in token(inputs).items()}
    dense = inputs["initial_state"].to(device, torch.bfloat16)
    wide = dense.new_zeros(2, 2, 5, 6)
    wide[..., ::2] = dense
    outs = [linear_attention_update(state, **step, backend="triton") for state in (dense, wide[..., ::2])]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(wide[..., ::2], dense)
    assert not wide[..., 1::2].any()


def test_what_runs_where(device):
    inputs = random_inputs(2, 1, 1, 2, 5, 3)
    shapes = {"state": (2, 2, 5, 3), "k": (2, 1, 5)}
    assert plan("linear_attention_update", shapes).backend == "reference"
    assert plan("linear_attention_update", shapes, device=device, backend="triton").backend == "triton"
    with pytest.raises(ArgumentError, match="H dividing HV"):
        plan("linear_attention_update", {**shapes, "k": (2, 3, 5)})
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        linear_attention_update(inputs["initial_state"], **token(inputs), backend="triton")
    step = {name: t.float().requires_grad_() for name, t in token(inputs).items()}
    with pytest.raises(BackendError, match="it has no backward"):
        linear_attention_update(inputs["initial_state"].float(), **step, backend="triton")


@pytest.mark.parametrize("shape", [(0, 1, 1, 2, 5, 3), (2, 1, 1, 2, 0, 3), (2, 1, 1, 2, 5, 0)], ids=str)
def test_empty(shape, device):
    inputs = random_inputs(*shape, decay="channel")
    step = {name: t.to(device, torch.float32) for name, t in token(inputs).items()}
    out = linear_attention_update(inputs["initial_state"].to(device, torch.float32), **step, backend="triton")
    assert out.shape == step["v"].shape
    assert not out.any()


def test_states_that_share_their_memory_are_refused(device):
    """What the reference says of itself a kernel would not notice: programs would write over each other."""
    inputs = random_inputs(2, 1, 1, 2, 5, 3, decay="scalar")
    step = {name: t.to(device, torch.float32) for name, t in token(inputs).items()}
    state = inputs["initial_state"].to(device, torch.float32)
    with pytest.raises(ArgumentError, match=r"state: .* strides \(0, .* share their memory.*contiguous\(\) copies"):
        linear_attention_update(state[:1].expand_as(state), **step, backend="triton")
    one = {name: t[:1] for name, t in step.items()}
    linear_attention_update(state[:1].expand_as(state[:1]), **one, backend="triton")
