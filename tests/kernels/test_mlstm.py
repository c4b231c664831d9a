"""The mLSTM against its recurrence in float64 and transformers' form of it."""

from __future__ import annotations

import pytest
import torch
from kernels.evaluation import normals
from torch.nn.functional import logsigmoid

from compressm.errors import ArgumentError
from compressm.kernels import mlstm

STATES = ("C", "n", "m")


def random_inputs(batch=2, length=20, key_heads=2, heads=4, keys=5, values=3, *, gates=1.0):
    normal = normals(0)
    steps, shared = (batch, length, heads), (batch, length, key_heads, keys)
    inputs = {"q": normal(*shared), "k": normal(*shared), "v": normal(*steps, values)}
    inputs |= {"i": gates * normal(*steps), "f": gates * normal(*steps)}
    return inputs | {"C": normal(batch, heads, keys, values), "n": normal(batch, heads, keys), "m": normal(batch, heads)}


def recurrence(q, k, v, i, f, C, n, m, eps=1e-6):
    """A step at a time, as published."""
    q, k = (t.repeat_interleave(v.shape[2] // q.shape[2], 2) for t in (q, k))
    outputs = []
    for t in range(v.shape[1]):
        forget, before = logsigmoid(f[:, t]), m
        m = torch.maximum(forget + m, i[:, t])
        keep, write = (forget + before - m).exp()[..., None], (i[:, t] - m).exp()[..., None]
        C = keep[..., None] * C + write[..., None] * k[:, t, :, :, None] * v[:, t, :, None, :]
        n = keep * n + write * k[:, t]
        query = q[:, t] * q.shape[-1] ** -0.5
        divisor = torch.maximum((query * n).sum(-1).abs(), (-m).exp()) + eps
        outputs.append((query[..., None] * C).sum(-2) / divisor[..., None])
    return torch.stack(outputs, 1), (C, n, m)


def call(q, k, v, i, f, C, n, m):
    return mlstm(q, k, v, i, f, initial_state=(C, n, m), output_final_state=True)


def evaluate(function, inputs, dtype):
    leaves = {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}
    h, states = function(**leaves)
    loss = (h * torch.linspace(-1, 2, h.shape[-1], dtype=dtype)).sum() + sum(t.square().sum() for t in states)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    results = {"h": h, **{f"last {name}": t for name, t in zip(STATES, states, strict=True)}}
    return {name: t.detach() for name, t in (results | dict(zip(leaves, gradients, strict=True))).items()}


@pytest.mark.parametrize("gates", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_the_recurrence(assert_close, gates, dtype):
    inputs = random_inputs(gates=gates)
    inputs = {name: t.to(dtype).double() for name, t in inputs.items()}
    oracle = evaluate(recurrence, inputs, torch.float64)
    for name, found in evaluate(call, inputs, dtype).items():
        assert_close(found, oracle[name], name)


@pytest.mark.parametrize("split", [1, 7, 19])
def test_states_carry_a_sequence_on(assert_close, split):
    inputs = {name: t for name, t in random_inputs().items() if name not in STATES}
    whole, last = mlstm(**inputs, output_final_state=True)
    assert mlstm(**inputs)[1] is None
    first, states = mlstm(**{name: t[:, :split] for name, t in inputs.items()}, output_final_state=True)
    second, behind = mlstm(**{name: t[:, split:] for name, t in inputs.items()}, initial_state=states, output_final_state=True)
    assert_close(torch.cat([first, second], 1), whole)
    for a, b in zip(behind, last, strict=True):
        assert_close(a, b)
    nothing, same = mlstm(**{name: t[:, :0] for name, t in inputs.items()}, initial_state=states, output_final_state=True)
    assert nothing.shape == (2, 0, 4, 3)
    assert all(torch.equal(a, b) for a, b in zip(same, states, strict=True))


def test_transformers_computes_the_same(assert_close):
    xlstm = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    if not hasattr(xlstm, "mlstm_chunkwise_native_autograd"):
        pytest.skip("the xlstm package is installed, and transformers has no form of its own")
    inputs = {name: t.float() for name, t in random_inputs(length=32, key_heads=4).items() if name not in STATES}
    q, k, v, i, f = (t.transpose(1, 2).contiguous() for t in inputs.values())
    expected, states = xlstm.mlstm_chunkwise_native_autograd(q, k, v, i, f, return_last_states=True, chunk_size=8)
    h, last = mlstm(**inputs, output_final_state=True)
    assert_close(h, expected.transpose(1, 2).double())
    for a, b in zip(last, states, strict=True):
        assert_close(a, b.double().view(a.shape))


@pytest.mark.parametrize("name", ["q", "i", "f"])
def test_wrong_tensors_are_named(name):
    inputs = {key: t for key, t in random_inputs().items() if key not in STATES}
    inputs[name] = inputs[name][:, 1:]
    with pytest.raises(ArgumentError, match=r"^(v|i|f): expected"):
        mlstm(**inputs)


def test_wrong_states_are_named():
    inputs = random_inputs()
    C, n, m = (inputs.pop(name) for name in STATES)
    with pytest.raises(ArgumentError, match="initial_state, n: expected"):
        mlstm(**inputs, initial_state=(C, m, m))
    with pytest.raises(ArgumentError, match="initial_state: expected three"):
        mlstm(**inputs, initial_state=(C, n))
