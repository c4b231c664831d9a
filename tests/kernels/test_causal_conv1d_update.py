"""The decode step of the causal convolution: equal to the convolution, in place, in pools and circular buffers."""

from __future__ import annotations

import pytest
import torch
from kernels.causal_conv1d_cases import random_inputs
from torch.nn import functional as F

from compressm.errors import ArgumentError
from compressm.kernels import causal_conv1d, causal_conv1d_update

WIDTHS = (1, 2, 4, 8, 12)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("spare", [0, 1, 5])
@pytest.mark.parametrize("sizes", [(1,) * 12, (5, 7), (12,)], ids=len)
def test_updates_are_the_steps(assert_close, width, spare, sizes):
    x, weight, bias, before = random_inputs(2, 6, 12, width).values()
    expected = causal_conv1d(x, weight, bias, activation="silu", initial_states=before)
    state = F.pad(before, (spare, 0), value=float("nan"))
    out = [causal_conv1d_update(part, state, weight, bias, "silu") for part in x.split(sizes, -1)]
    assert_close(torch.cat(out, -1), expected)
    held = width - 1 + spare
    assert torch.equal(state, torch.cat([F.pad(before, (spare, 0), value=float("nan")), x], -1)[..., 12:][..., :held])


def test_a_step_may_go_without_its_axis():
    x, weight, bias, before = random_inputs(2, 6, 1, 4).values()
    first, second = before.clone(), before.clone()
    out = causal_conv1d_update(x[..., 0], first, weight, bias, activation="swish")
    assert torch.equal(out, causal_conv1d_update(x, second, weight, bias, activation="silu")[..., 0])
    assert torch.equal(first, second)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("spare", [0, 2])
@pytest.mark.parametrize("size", [1, 3, 12])
def test_a_circular_buffer_holds_the_last_inputs(assert_close, width, spare, size):
    x, weight, bias, _ = random_inputs(2, 6, 36, width).values()
    expected = causal_conv1d(x, weight, bias, activation="silu")
    state, lengths = torch.zeros(2, 6, width - 1 + spare).double(), torch.tensor([0, 0], dtype=torch.int32)
    held = state.shape[-1]
    for start in range(0, 36, size):
        out = causal_conv1d_update(x[..., start : start + size], state, weight, bias, "silu", lengths + start)
        assert_close(out, expected[..., start : start + size])
        for t in range(max(0, start + size - held), start + size):
            assert torch.equal(state[..., t % held], x[..., t])


def test_rows_of_a_pool_and_padding(assert_close):
    x, weight, bias, _ = random_inputs(5, 6, 3, 4).values()
    pool = torch.randn(9, 6, 5).double()
    for pad, indices in ((-1, [7, -1, 0, 3, -1]), (3, [7, 3, 0, 2, -2]), (99, [7, 99, 0, 2, 99]), (-1, [-1] * 5)):
        state, rows = pool.clone(), torch.tensor(indices, dtype=torch.int32)
        valid = torch.tensor([row >= 0 and row != pad for row in indices])
        out = causal_conv1d_update(x, state, weight, bias, "silu", None, rows, pad)
        picked = pool[rows.long()[valid]]
        expected = causal_conv1d_update(x[valid], picked, weight, bias, "silu")
        assert torch.equal(out[valid], expected)
        assert not out[~valid].any()
        after = pool.clone()
        after[rows.long()[valid]] = picked
        assert torch.equal(state, after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_keep_their_dtype_and_strides(assert_close, dtype):
    x, weight, bias, before = (t.float() for t in random_inputs(2, 6, 1, 4).values())
    memory = torch.zeros(3, 2, 6, 2, dtype=dtype)
    state = memory[..., 1].permute(1, 2, 0)
    state.copy_(before)
    exact = state.double()
    out = causal_conv1d_update(x, state, weight, bias)
    assert_close(out, causal_conv1d_update(x.double(), exact, weight.double(), bias.double()))
    assert torch.equal(state, exact.to(dtype))
    assert not memory[..., 0].any()


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("indices", [None, [2, -1, 0], [-1, -1, -1]])
def test_gradients_of_everything(circular, indices):
    x, weight, bias, before = (t.requires_grad_() for t in random_inputs(3, 2, 2, 3).values())
    lengths = torch.tensor([3, 0, 4]) if circular else None
    rows = None if indices is None else torch.tensor(indices)

    def call(x, weight, bias, before):
        state = before.clone()
        return causal_conv1d_update(x, state, weight, bias, "silu", lengths, rows), state

    assert torch.autograd.gradcheck(call, (x, weight, bias, before))


@pytest.mark.parametrize("pooled", [False, True])
def test_an_empty_batch(pooled):
    rows = torch.zeros(0, dtype=torch.int32) if pooled else None
    state = torch.ones(3 if pooled else 0, 5, 3)
    out = causal_conv1d_update(torch.ones(0, 5), state, torch.ones(5, 4), conv_state_indices=rows)
    assert out.shape == (0, 5)
    assert (state == 1).all()


def test_compiles_into_one_graph(assert_close):
    x, weight, bias, _ = (t.float() for t in random_inputs(3, 5, 2, 4).values())
    state, rows, lengths = torch.randn(7, 5, 4), torch.tensor([6, -1, 2]), torch.tensor([4, 1, 9])
    copy = state.clone()
    compiled = torch.compile(causal_conv1d_update, fullgraph=True, backend="aot_eager")
    out = compiled(x, state, weight, bias, "silu", lengths, rows)
    assert_close(out, causal_conv1d_update(x, copy, weight, bias, "silu", lengths, rows))
    assert torch.equal(state, copy)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("x", lambda t: t[..., None, None]),
        ("conv_state", lambda t: t[..., 1:]),
        ("conv_state", lambda t: t[:1]),
        ("conv_state", lambda t: t.long()),
        ("weight", lambda t: t[1:]),
        ("bias", lambda t: t[1:]),
        ("activation", lambda t: "relu"),
        ("cache_seqlens", lambda t: torch.zeros(3, dtype=torch.int32)),
        ("cache_seqlens", lambda t: torch.zeros(2)),
        ("conv_state_indices", lambda t: torch.zeros(2)),
        ("conv_state_indices", lambda t: torch.zeros(2, 1, dtype=torch.int32)),
        ("conv_state_indices", lambda t: torch.tensor([0, 2])),
        ("conv_state_indices", lambda t: torch.zeros(2, dtype=torch.int32, device="meta")),
    ],
)
def test_wrong_arguments_are_named(name, wrong):
    inputs = random_inputs(2, 5, 1, 4)
    arguments = {"x": inputs["x"][..., 0], "conv_state": inputs["initial_states"], "weight": inputs["weight"]}
    arguments |= {"bias": inputs["bias"]}
    arguments[name] = wrong(arguments.get(name))
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        causal_conv1d_update(**arguments)
