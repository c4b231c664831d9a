"""What mamba_ssm's users rely on: its published grids of the scan and of the decode step, each against float64.

The grids of options are whole; lengths, numbers of channels and of states take turns over them.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from kernels.conformance import compare, cycle

from compressm.kernels import selective_scan, selective_state_update

ITYPES = (torch.float32, torch.float16, torch.bfloat16)
LENGTHS = (8, 16, 32, 64, 128)
FLAGS = (False, True)


def scan_inputs(itype, variable_B, variable_C, groups, skip, gate, length, batch=2, channels=4, states=8):
    def mixing(variable):
        if not variable:
            return torch.randn(channels, states)
        shape = (batch, states, length) if groups == 1 else (batch, groups, states, length)
        return torch.randn(shape, dtype=itype)

    return {
        "u": torch.randn(batch, channels, length, dtype=itype),
        "delta": (0.5 * torch.rand(batch, channels, length)).to(itype),
        "A": -0.5 * torch.rand(channels, states),
        "B": mixing(variable_B),
        "C": mixing(variable_C),
        "D": torch.randn(channels) if skip else None,
        "z": torch.randn(batch, channels, length, dtype=itype) if gate else None,
        "delta_bias": 0.5 * torch.rand(channels),
    }


def scan(tensors, backend):
    return selective_scan(**tensors, delta_softplus=True, return_last_state=True, backend=backend)


@pytest.mark.parametrize("itype", ITYPES)
@pytest.mark.parametrize(("variable_B", "variable_C"), list(itertools.product(FLAGS, repeat=2)))
@pytest.mark.parametrize("groups", [1, 2])
def test_scan(assert_close, itype, variable_B, variable_C, groups):
    for number, (skip, gate) in enumerate(itertools.product(FLAGS, repeat=2)):
        length = cycle(LENGTHS, number + 2 * groups + variable_B)
        compare(scan, scan_inputs(itype, variable_B, variable_C, groups, skip, gate, length), assert_close)


@pytest.mark.slow
@pytest.mark.parametrize("itype", ITYPES)
@pytest.mark.parametrize("length", [256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("groups", [1, 2])
def test_long_scans(assert_close, itype, length, groups):
    compare(scan, scan_inputs(itype, True, True, groups, True, True, length), assert_close)


def head_inputs(itype, states, groups, tied, gate, heads, width=64, batch=2, entries=None):
    """The arguments of a decode step with heads by name; tied: A, dt and dt_bias are one number a head."""
    rates, bias = -torch.rand(heads, width, states) - 1.0, torch.rand(heads, width) - 4.0
    dt = torch.randn(batch, heads, width).to(itype)
    if tied:
        rates, dt = rates[:, :1, :1].expand(-1, width, states), dt[..., :1].expand(-1, -1, width)
        bias = bias[:, :1].expand(-1, width)
    return {
        "state": torch.randn(entries or batch, heads, width, states, dtype=itype),
        "x": torch.randn(batch, heads, width).to(itype),
        "dt": dt,
        "A": rates,
        "B": torch.randn(batch, groups, states),
        "C": torch.randn(batch, groups, states),
        "D": torch.randn(heads, width),
        "z": torch.randn(batch, heads, width).to(itype) if gate else None,
        "dt_bias": bias,
    }


def step(**options):
    def call(tensors, backend):
        tensors = {name: t.clone() if name == "state" else t for name, t in tensors.items()}
        return selective_state_update(**tensors, dt_softplus=True, backend=backend, **options), tensors["state"]

    return call


def plain_inputs(itype, states, gate, channels, batch=2, entries=None):
    """The arguments of a decode step without heads."""
    inputs = head_inputs(itype, states, 1, False, gate, 1, channels, batch, entries)
    axes = {"state": 1, "x": 1, "dt": 1, "z": 1, "A": 0, "D": 0, "dt_bias": 0, "B": 1, "C": 1}
    return {name: None if t is None else t.squeeze(axes[name]) for name, t in inputs.items()}


@pytest.mark.parametrize("itype", ITYPES)
@pytest.mark.parametrize("gate", FLAGS)
@pytest.mark.parametrize("states", [16, 32, 64])
def test_step(assert_close, itype, gate, states):
    for channels in (48, 64 + 16):
        inputs = plain_inputs(itype, states, gate, channels)
        compare(step(), inputs, assert_close, grads=False)
        compare(step(), inputs, assert_close)


@pytest.mark.parametrize("itype", ITYPES)
@pytest.mark.parametrize("gate", FLAGS)
@pytest.mark.parametrize("states", [16, 32, 64])
def test_step_of_rows_of_a_pool(assert_close, itype, gate, states):
    inputs = plain_inputs(itype, states, gate, 64 + 16, 4, 40)
    indices = torch.randperm(40)[:4].int()
    compare(step(state_batch_indices=indices), inputs, assert_close, grads=False)
    compare(step(state_batch_indices=indices), inputs, assert_close)


@pytest.mark.parametrize("itype", ITYPES)
@pytest.mark.parametrize("tied", FLAGS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_step_with_heads(assert_close, itype, tied, groups):
    for number, gate in enumerate(FLAGS):
        inputs = head_inputs(itype, cycle((16, 32, 64), groups + number), groups, tied, gate, 4)
        compare(step(), inputs, assert_close, grads=False)
        compare(step(), inputs, assert_close)


@pytest.mark.slow
@pytest.mark.parametrize("itype", ITYPES)
@pytest.mark.parametrize("channels", [2048, 2048 + 16, 4096])
def test_large_steps(assert_close, itype, channels):
    compare(step(), plain_inputs(itype, 64, True, channels), assert_close, grads=False)
    indices = torch.randperm(20)[:2].int()
    compare(step(state_batch_indices=indices), plain_inputs(itype, 64, True, channels, 2, 20), assert_close, grads=False)
    for tied in FLAGS:
        compare(step(), head_inputs(itype, 64, 4, tied, True, channels // 64), assert_close, grads=False)
