"""The Triton causal convolution, on a GPU or in the interpreter, against the float64 reference: output and every gradient."""

from __future__ import annotations

import pytest
import torch
from kernels.causal_conv1d_cases import LAYOUTS, check, evaluate, random_inputs

from compressm.errors import BackendError
from compressm.kernels import causal_conv1d
from compressm.kernels.causal_conv1d import triton_convolution as triton_conv

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def launches(record_calls):
    """Names of the Triton functions that ran."""
    return record_calls(triton_conv, "forward", "backward")


@pytest.fixture
def short_stretches(monkeypatch):
    monkeypatch.setattr(triton_conv, "CONFIG", triton_conv.CONFIG | {"BT": 16})


def compare(assert_close, device, inputs, dtype=torch.float32, **options):
    oracle = evaluate(inputs, torch.float64, "reference", activation=options.get("activation", "silu"))
    check(evaluate(inputs, dtype, "triton", device=device, **options), oracle, assert_close, dtype)


@pytest.mark.parametrize(
    ("layout", "width"), [*((layout, 3) for layout in LAYOUTS), *(("steps", width) for width in (1, 2, 4, 8))]
)
@pytest.mark.usefixtures("short_stretches")
def test_layouts_and_widths(assert_close, device, launches, layout, width):
    compare(assert_close, device, random_inputs(1, 3, 33, width), layout=layout)
    assert launches == ["forward", "backward"]


@pytest.mark.parametrize("length", [1, 2, 3, 29, 30, 31, 257])
@pytest.mark.usefixtures("short_stretches")
def test_lengths(assert_close, device, length):
    compare(assert_close, device, random_inputs(1, 2, length, 4))


@pytest.mark.parametrize("without", [("bias",), ("initial_states",), ("bias", "initial_states")], ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_optional_arguments(assert_close, device, without, activation):
    compare(assert_close, device, random_inputs(2, 3, 19, 4, without=without), activation=activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(assert_close, device, dtype):
    inputs = {name: t.to(dtype).double() for name, t in random_inputs(2, 3, 65, 4).items()}
    compare(assert_close, device, inputs, dtype)


def test_same_bits_every_time(device):
    inputs = random_inputs(2, 3, 40, 4)
    first, second = (evaluate(inputs, torch.float32, "triton", device=device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_float64_is_refused(device):
    inputs = {name: t.to(device) for name, t in random_inputs(1, 2, 3, 2).items()}
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        causal_conv1d(**inputs, backend="triton")
