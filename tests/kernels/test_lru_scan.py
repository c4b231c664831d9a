"""The scan of an LRU's parameters: values and gradients against the definition in float64, half precision, bad input."""

from __future__ import annotations

import pytest
import torch

from compressm.errors import ArgumentError, BackendError
from compressm.kernels import lru_scan
from compressm.kernels.lru_scan import lru_operands_op

NAMES = ["x", "nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im", "D"]
SHAPES = [(1, 1, 1, 1, 1), (2, 9, 3, 4, 3), (2, 40, 2, 5, 7), (3, 0, 2, 3, 2), (1, 6, 33, 300, 33)]  # batch, L, H, N, H_out


def random_inputs(batch, length, channels, states, outputs):
    """Float64 arguments by name, moduli in [0.7, 0.99], D only where it fits."""
    draw = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    modulus = 0.7 + 0.29 * torch.rand(states, generator=draw, dtype=torch.float64)
    values = [
        normal(batch, length, channels), (-modulus.log()).log(), normal(states), 0.3 * normal(states),
        normal(states, channels), normal(states, channels), normal(outputs, states), normal(outputs, states),
        normal(channels) if channels == outputs else None,
    ]  # fmt: skip
    return dict(zip(NAMES, values, strict=True)), torch.complex(normal(batch, states), normal(batch, states))


def definition(x, nu_log, theta_log, gamma_log, B_re, B_im, C_re, C_im, D, *, initial_state):
    lam = torch.exp(torch.complex(-nu_log.exp(), theta_log.exp()))
    B, C, h, y = gamma_log.exp()[:, None] * torch.complex(B_re, B_im), torch.complex(C_re, C_im), initial_state, []
    for u in x.unbind(1):
        h = lam * h + u.to(B.dtype) @ B.T
        y.append((h @ C.T).real + (0 if D is None else D * u))
    return torch.stack(y, 1) if y else x.new_zeros((x.shape[0], 0, C.shape[0])), h


def evaluate(run, inputs, state, dtype):
    """Output, last state and the gradients of a random linear functional of both."""
    leaves = {name: None if t is None else t.to(dtype).requires_grad_() for name, t in inputs.items()}
    start = state.to(dtype.to_complex()).requires_grad_()
    y, last = run(**leaves, initial_state=start)
    draw = torch.Generator().manual_seed(7)
    weights = [torch.randn(t.shape, generator=draw, dtype=torch.float64) for t in (y, last.real)]
    loss = (y * weights[0].to(dtype)).sum() + (last.real * weights[1].to(dtype)).sum() + last.imag.square().sum()
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None} | {"initial_state": start}
    grads = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)  # without steps some are not used
    return {"y": y.detach(), "last": last.detach(), **dict(zip(wanted, grads, strict=True))}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), ("cpp", torch.float32), (None, torch.float32)])
@pytest.mark.usefixtures("poisoned_memory")
def test_it_is_the_definition(assert_close, shape, backend, dtype):
    inputs, state = random_inputs(*shape)

    def run(**arguments):
        return lru_scan(**arguments, return_last_state=True, backend=backend)

    oracle, results = (evaluate(f, inputs, state, t) for f, t in ((definition, torch.float64), (run, dtype)))
    for name, expected in oracle.items():
        assert_close(results[name].to(expected.dtype), expected, name, dtype)


def test_operands_read_any_strides():
    inputs, _ = random_inputs(1, 1, 5, 6, 4)
    dense = [inputs[name].float() for name in NAMES[1:8]]
    strided = [torch.stack([t, t], -1)[..., 0] for t in dense]
    assert all(torch.equal(a, b) for a, b in zip(lru_operands_op(*strided), lru_operands_op(*dense), strict=True))


def test_half_precision_parameters_are_used_in_float32(assert_close):
    inputs, state = random_inputs(2, 30, 4, 6, 4)
    halves = {name: t.bfloat16() for name, t in inputs.items()}
    y, last = lru_scan(**halves, initial_state=state.cfloat(), return_last_state=True)
    assert y.dtype == torch.bfloat16
    assert last.dtype == torch.cfloat
    exact, _ = lru_scan(**{name: t.double() for name, t in halves.items()}, initial_state=state, return_last_state=True)
    assert_close(y.double(), exact, "y", torch.bfloat16)


def test_frozen_parameters_get_no_gradient():
    inputs, _ = random_inputs(1, 8, 3, 4, 3)
    leaves = {name: t.float().requires_grad_(name in ("x", "C_im")) for name, t in inputs.items()}
    lru_scan(**leaves).sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == {"x", "C_im"}


@pytest.mark.parametrize("name", [*NAMES, "initial_state"])
def test_wrong_arguments_are_named(name):
    inputs, state = random_inputs(2, 5, 3, 4, 3)
    arguments = {**inputs, "initial_state": state}
    lru_scan(**arguments)
    spoken = {"B_re": "B", "B_im": "Im B", "C_re": "C", "C_im": "Im C"}.get(name, name)
    wrong = [arguments[name][..., :2], arguments[name].long() if name != "initial_state" else state.real]
    if name in ("x", "nu_log"):
        wrong[0] = arguments[name][None]
    for tensor in wrong:
        with pytest.raises(ArgumentError, match=f"^{spoken}:"):
            lru_scan(**{**arguments, name: tensor})


def test_a_backend_that_cannot_run_says_why():
    inputs, _ = random_inputs(1, 3, 2, 2, 2)
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        lru_scan(**inputs, backend="cpp")
