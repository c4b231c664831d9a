"""Selective scan: the reference against the definition and the golden files; what bad input gets."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernels.evaluation import check
from kernels.selective_scan_cases import TENSORS, evaluate, random_inputs
from torch.nn.functional import silu, softplus

from compressm.errors import ArgumentError, BackendError
from compressm.kernels import selective_scan

GOLDEN = ["scan_B2_D3_L33_N5_G1", "scan_B1_D4_L130_N12_G1", "scan_B2_D8_L64_N16_G2", "scan_B1_D2_L257_N128_G1"]


@pytest.mark.parametrize("name", GOLDEN)
def test_reference_meets_golden(golden, assert_close, name):
    g = golden(name)
    leaves = {key: g[key].clone().requires_grad_() for key in TENSORS if key in g}
    out, last = selective_scan(**leaves, delta_softplus=True, return_last_state=True, backend="reference")
    gradients = torch.autograd.grad((out * g["w"]).sum(), list(leaves.values()))
    torch.testing.assert_close(out, g["out"], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(last, g["last_state"], rtol=1e-12, atol=1e-13)
    for key, gradient in zip(leaves, gradients, strict=True):
        assert (gradient - g[f"grad_{key}"]).norm() <= 1e-12 * g[f"grad_{key}"].norm(), key


def test_reference_is_the_definition():
    inputs = random_inputs(2, 4, 6, 3, groups=2, constant=["C"])
    out, last = selective_scan(**inputs, delta_softplus=False, return_last_state=True, backend="reference")
    B = inputs["B"].repeat_interleave(2, 1)
    dt = inputs["delta"] + inputs["delta_bias"][:, None]
    h = inputs["initial_state"]
    for t in range(6):
        h = torch.exp(dt[..., t, None] * inputs["A"]) * h + (dt * inputs["u"])[..., t, None] * B[..., t]
        y = torch.einsum("bdn,dn->bd", h, inputs["C"]) + inputs["D"] * inputs["u"][..., t]
        torch.testing.assert_close(out[..., t], y * silu(inputs["z"][..., t]))
    torch.testing.assert_close(last, h)


def test_reference_gradients_are_the_derivatives():
    inputs = random_inputs(2, 2, 5, 3)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def call(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        return selective_scan(**named, delta_softplus=True, return_last_state=True, backend="reference")

    assert torch.autograd.gradcheck(call, leaves)


def test_packed_sequences_are_the_sequences_one_by_one():
    bounds = [0, 7, 7, 12, 33]
    inputs = random_inputs(1, 3, 33, 5, sequences=4)
    packed = torch.tensor(bounds, dtype=torch.int32)
    out, last = selective_scan(
        **inputs, delta_softplus=True, return_last_state=True, cu_seqlens=packed, backend="reference"
    )
    for i, (first, stop) in enumerate(itertools.pairwise(bounds)):
        piece = {k: t[..., first:stop] if k in ("u", "delta", "B", "C", "z") else t for k, t in inputs.items()}
        piece["initial_state"] = inputs["initial_state"][i : i + 1]
        alone, end = selective_scan(**piece, delta_softplus=True, return_last_state=True, backend="reference")
        torch.testing.assert_close(out[..., first:stop], alone)
        torch.testing.assert_close(last[i : i + 1], end)


def test_large_step_sizes_pass_softplus_unchanged():
    inputs = random_inputs(1, 2, 4, 3, without=["delta_bias", "z", "D", "initial_state"])
    inputs["delta"] = inputs["delta"] * 30
    out = selective_scan(**inputs, delta_softplus=True, backend="reference")
    inputs["delta"] = softplus(inputs["delta"], threshold=1e9)
    torch.testing.assert_close(out, selective_scan(**inputs, backend="reference"))


WRONG = {
    "u": [("u", lambda t: t[0]), ("u", lambda t: t.long())],
    "A": [("A", lambda t: t[:1]), ("A", lambda t: t.cfloat()), ("A", lambda t: t.neg()), ("A", lambda t: t * torch.nan)],
    "B": [("B", lambda t: t[..., 1:]), ("B", lambda t: t.repeat(1, 2, 1, 1)), ("B", lambda t: t[:, :0])],
    "C": [("C", lambda t: t[:, :, 1:]), ("C", lambda t: t.repeat(1, 3, 1, 1)), ("C", lambda t: t.long())],
    "others": [
        ("B", lambda t: t[0, 0]),
        ("delta", lambda t: t[:, :1]),
        ("delta", lambda t: t.cfloat()),
        ("D", lambda t: t[1:]),
        ("z", lambda t: t[..., 1:]),
        ("delta_bias", lambda t: t[1:]),
        ("initial_state", lambda t: t[:1]),
        ("D", lambda t: t.to("meta")),
    ],
}


@pytest.mark.parametrize(("name", "wrong"), [case for cases in WRONG.values() for case in cases])
def test_wrong_tensors_are_named(name, wrong):
    inputs = random_inputs(2, 3, 6, 4)
    inputs[name] = wrong(inputs[name])
    with pytest.raises(ArgumentError, match=rf"^{name}: expected"):
        selective_scan(**inputs)


@pytest.mark.parametrize(
    "bounds", [[0, 4], [1, 6], [0, 5, 3, 6], [0], [[0, 6]], [0.0, 6.0], [0, 7]], ids=str
)
def test_wrong_cu_seqlens(bounds):
    inputs = random_inputs(1, 3, 6, 4, without=["initial_state"])
    with pytest.raises(ArgumentError, match=r"^cu_seqlens: expected"):
        selective_scan(**inputs, cu_seqlens=torch.tensor(bounds))


def test_packing_needs_a_batch_of_one():
    inputs = random_inputs(2, 3, 6, 4, without=["initial_state"])
    with pytest.raises(ArgumentError, match="batch of 1"):
        selective_scan(**inputs, cu_seqlens=torch.tensor([0, 6]))


def test_unknown_backend():
    with pytest.raises(BackendError, match="expected one of cpp, reference, triton, got 'cuda'"):
        selective_scan(**random_inputs(1, 2, 3, 2), backend="cuda")


@pytest.mark.parametrize("shape", [(0, 3, 6, 4), (2, 3, 0, 4), (2, 0, 6, 4), (2, 3, 6, 0)], ids=["batch", "L", "D", "N"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_empty(shape, backend, assert_close):
    batch, channels, length, states = shape
    inputs = random_inputs(batch, channels, length, states)
    results = evaluate(inputs, torch.float32, backend)
    assert results["out"].shape == (batch, channels, length)
    assert results["last"].shape == (batch, channels, states)
    if length == 0:
        check({"last": results["last"]}, {"last": inputs["initial_state"]}, assert_close, torch.float32)
    if states == 0:
        gated = inputs["D"][:, None] * inputs["u"] * silu(inputs["z"])
        check({"out": results["out"]}, {"out": gated}, assert_close, torch.float32)
