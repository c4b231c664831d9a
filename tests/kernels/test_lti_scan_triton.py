"""The Triton LTI scan, on a GPU or in the interpreter, against the float64 definition: outputs and every gradient."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compressm.errors import ArgumentError, BackendError
from compressm.kernels import diagonal_scan, lti_scan, lti_scan_planar, plan
from compressm.kernels.diagonal_scan import triton_scan as triton_scan
from compressm.kernels.lti_scan.op import Operands, _run

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def launches(record_calls):
    """Names of the Triton functions that ran."""
    return record_calls(triton_scan, "diagonal_scan_forward", "diagonal_scan_backward")


@pytest.fixture
def short_stretches(monkeypatch):
    """Split every sequence of 64 steps or more, as long ones are with few states."""
    monkeypatch.setattr(triton_scan, "MIN_STRETCH", 28)
    monkeypatch.setattr(triton_scan, "MIN_STRETCHES", 2)


def scan_inputs(batch, length, states, initial=True):
    """Float64 x, log_decay, phase and initial state of a diagonal scan, all exact in float32; moduli in [0.8, 1]."""
    log_decay, phase = -0.2 * torch.rand(states), 6 * torch.rand(states)
    x, start = torch.randn(batch, length, 2 * states), torch.randn(batch, 2 * states)
    return [x.double(), log_decay.double(), phase.double(), start.double() if initial else None]


def evaluate_scan(inputs, reverse, backend, device, dtype, parameters=None):
    """States and gradients of a random linear functional of them, on the CPU; parameters: dtype of all but x."""
    leaves = [
        None if t is None else t.to(device, (parameters or dtype) if at else dtype, copy=True).requires_grad_()
        for at, t in enumerate(inputs)
    ]
    h = diagonal_scan(*leaves[:3], initial_state=leaves[3], reverse=reverse, backend=backend)
    weight = torch.randn(h.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (h.double() * weight.to(device)).sum().backward()
    names = ("x", "log_decay", "phase", "initial state")
    grads = {name: t.grad.cpu() for name, t in zip(names, leaves, strict=True) if t is not None}
    return {"h": h.detach().cpu(), **grads}


def check_scan(inputs, reverse, device, assert_close, dtype=torch.float32, parameters=None):
    oracle = evaluate_scan(inputs, reverse, "reference", "cpu", torch.float64)
    results = evaluate_scan(inputs, reverse, "triton", device, dtype, parameters)
    assert results["h"].dtype == results["x"].dtype == dtype
    for name, expected in oracle.items():
        assert_close(results[name], expected, name, dtype)


@pytest.mark.parametrize(
    ("shape", "reverse", "initial"),
    [
        ((2, 1, 1), False, True),
        ((2, 33, 5), False, False),
        ((2, 33, 5), False, True),
        ((2, 33, 5), True, False),
        ((2, 33, 5), True, True),
        ((1, 257, 13), False, True),
        ((3, 16, 12), True, True),
        ((1, 18, 100), True, True),
        ((1, 17, 128), False, True),
        ((1, 9, 300), False, True),
    ],
)
def test_diagonal_scan(assert_close, device, launches, shape, reverse, initial):
    check_scan(scan_inputs(*shape, initial), reverse, device, assert_close)
    assert launches == ["diagonal_scan_forward", "diagonal_scan_backward"]


@pytest.mark.parametrize(("reverse", "initial"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("length", [90, 96])
@pytest.mark.usefixtures("short_stretches")
def test_split_sequences(assert_close, device, length, reverse, initial):
    assert triton_scan._split(2, length, 6) == (32, 3)
    check_scan(scan_inputs(2, length, 3, initial), reverse, device, assert_close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [None, torch.float32])
def test_half_precision_keeps_float32_state(assert_close, device, dtype, parameters):
    inputs = [t.to(dtype).double() for t in scan_inputs(2, 65, 9)]
    check_scan(inputs, False, device, assert_close, dtype, parameters)


def test_stretches_cover_sequences():
    unit = triton_scan.FORWARD_CONFIG["U"]
    for batch in (1, 3, 50, 1000):
        for length in (1, 33, 257, 1024, 5000, 65536, 10**6, 10**9):
            for states in (1, 5, 64, 300, 10**5):
                steps, stretches = triton_scan._split(batch, length, 2 * states)
                assert steps * (stretches - 1) < length <= steps * stretches
                assert stretches == 1 or steps % unit == 0
                assert (steps + unit) * 2 * states < 2**31
    assert triton_scan._split(1, 65536, 128)[1] == 256
    assert triton_scan._split(50, 1024, 768) == (1024, 1)


NAMES = ("u", "log_decay", "phase", "B_re", "B_im", "C_re", "C_im", "D", "initial_state")


def layer_inputs(batch, length, channels, states):
    """Float64 arguments of lti_scan_planar."""
    _, log_decay, phase, start = scan_inputs(batch, 0, states)
    shapes = [(states, channels)] * 2 + [(channels, states)] * 2 + [(channels,)]
    u, *rest = (torch.randn(*shape).double() for shape in [(batch, length, channels), *shapes])
    return [u, log_decay, phase, *rest, start]


def evaluate_layer(run, inputs, device, dtype):
    """Outputs and gradients of a random linear functional of (y, last state), on the CPU."""
    leaves = [t.to(device, dtype, copy=True).requires_grad_() for t in inputs]
    y, last = run(leaves)
    draw = torch.Generator().manual_seed(7)
    loss = sum((t.double() * torch.randn(t.shape, generator=draw, dtype=torch.float64).to(device)).sum() for t in (y, last))
    grads = dict(zip(NAMES, torch.autograd.grad(loss, leaves), strict=True))
    return {name: t.detach().cpu() for name, t in {"y": y, "last": last, **grads}.items()}


def layer(backend):
    return lambda t: lti_scan_planar(*t[:8], initial_state=t[8], return_last_state=True, backend=backend)


def check_layer(run, inputs, device, assert_close, dtype=torch.float32):
    oracle = evaluate_layer(layer("reference"), inputs, "cpu", torch.float64)
    results = evaluate_layer(run, inputs, device, dtype)
    for name, expected in oracle.items():
        assert_close(results[name], expected, name, dtype)
    return results, oracle


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 33, 3, 5), (1, 40, 2, 13)])
def test_lti_scan(assert_close, device, launches, shape):
    check_layer(layer("triton"), layer_inputs(*shape), device, assert_close)
    assert launches == ["diagonal_scan_forward", "diagonal_scan_backward"] * (len(launches) // 2)
    assert launches


@pytest.mark.parametrize("tau", [1, 4])
def test_lti_scan_forms(assert_close, device, launches, tau):
    def run(t):
        w_in, w_out = torch.cat([t[3], t[4]]), torch.cat([t[5], -t[6]], 1)
        return _run(t[0], Operands(t[1], t[2], w_in, w_out, t[7]), t[8], "triton", tau, 0, False)

    check_layer(run, layer_inputs(2, 33, 3, 12), device, assert_close)
    assert len(launches) == (2 if tau == 1 else 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lti_scan_in_half_precision(assert_close, device, dtype):
    inputs = [t.to(dtype).double() for t in layer_inputs(2, 20, 4, 5)]
    results, oracle = check_layer(layer("triton"), inputs, device, assert_close, dtype)
    assert results["y"].dtype == dtype
    assert results["last"].dtype == torch.float32
    assert_close(results["last"], oracle["last"], "last")


@pytest.mark.parametrize("backend", ["triton", "cpp", "reference"])
@pytest.mark.parametrize("shape", [(1, 9, 3, 5), (2, 64, 2, 50)])
def test_autocast_leaves_the_scan_in_float32(assert_close, device, backend, shape):
    place = "cpu" if backend == "cpp" else device

    def run(t):
        with torch.autocast(place, torch.bfloat16):
            return layer(backend)(t)

    check_layer(run, layer_inputs(*shape), place, assert_close)


def test_golden(golden, assert_close, device):
    g = golden("lru_N16_H4_L64")
    names = ["nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im", "D", "x"]
    p = {key: g[key].to(device, torch.float32).requires_grad_() for key in names}
    gamma = p["gamma_log"].exp()[:, None]
    log_lam = torch.complex(-p["nu_log"].exp(), p["theta_log"].exp())
    B, C = torch.complex(gamma * p["B_re"], gamma * p["B_im"]), torch.complex(p["C_re"], p["C_im"])
    y, last = lti_scan(p["x"][None], log_lam, B, C, p["D"], return_last_state=True, backend="triton")
    assert_close(y[0].detach().cpu(), g["y"], "y")
    assert_close(last[0].detach().cpu(), g["states"][-1], "last state")
    (y[0] * g["w"].to(y)).sum().backward()
    for key in names:
        assert_close(p[key].grad.cpu(), g[f"grad_{key}"], key)


def test_automatic_choice(device, launches):
    u, *rest = (t.float().to(device) for t in layer_inputs(1, 3, 2, 2))
    lti_scan_planar(u, *rest[:7])
    assert bool(launches) == (device == "cuda")
    shapes = {"u": (1, 3, 2), "B": (2, 2), "C": (2, 2)}
    assert plan("lti_scan", shapes, u.dtype, device).backend == ("triton" if device == "cuda" else "cpp")
    assert plan("lti_scan", shapes, u.dtype, device, backend="triton").backend == "triton"


def test_non_contiguous_operands(assert_close, device):
    x, log_decay, phase, start = (t.float().to(device) for t in scan_inputs(2, 20, 3))
    expected = diagonal_scan(x, log_decay, phase, initial_state=start, backend="triton")
    strided = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    every_second = torch.stack([start, start], 2)[:, :, 0]
    h = diagonal_scan(strided, log_decay, phase, initial_state=every_second, backend="triton")
    assert torch.equal(h, expected)
    (grad,) = torch.autograd.grad(h.transpose(0, 1), strided, torch.ones_like(h).transpose(0, 1))
    x.requires_grad_()
    again = diagonal_scan(x, log_decay, phase, initial_state=start, backend="triton").sum()
    assert_close(grad, torch.autograd.grad(again, x)[0])


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 4, 3), (2, 4, 0)])
def test_nothing_to_scan(device, shape):
    x, log_decay, phase, start = (t.float().to(device).requires_grad_() for t in scan_inputs(*shape))
    h = diagonal_scan(x, log_decay, phase, initial_state=start, backend="triton")
    assert h.shape == x.shape
    h.sum().backward()
    for leaf in (x, log_decay, phase, start):
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()


def test_same_bits_every_time(device):
    inputs = scan_inputs(3, 40, 33)
    first, second = (evaluate_scan(inputs, False, "triton", device, torch.float32) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_custom_ops_are_well_formed(device):
    x, log_decay, phase, start = (t.float().to(device).requires_grad_() for t in scan_inputs(2, 7, 4))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    for reverse, state in ((True, None), (False, start)):
        arguments = (x, log_decay, phase, state, reverse, "triton")
        torch.library.opcheck(torch.ops.compressm.diagonal_scan.default, arguments, test_utils=tests)
    arguments = (x.detach().bfloat16(), x.detach().bfloat16(), log_decay.detach(), phase.detach(), None, False, "triton")
    torch.library.opcheck(torch.ops.compressm.diagonal_scan_backward.default, arguments, test_utils=tests[:2])


def test_wrong_arguments_are_named():
    x, log_decay, phase, _ = scan_inputs(1, 3, 4)
    with pytest.raises(ArgumentError, match="phase"):
        diagonal_scan(x, log_decay, phase[:1])
    with pytest.raises(ArgumentError, match="log_decay"):
        diagonal_scan(x, log_decay[None], phase)


def test_calls_that_triton_cannot_run_say_why(device):
    x, log_decay, phase, _ = (t.to(device) for t in scan_inputs(1, 3, 4))
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        diagonal_scan(x, log_decay, phase, backend="triton")
    with pytest.raises(BackendError, match="not on meta"):
        diagonal_scan(*(t.to("meta", torch.float32) for t in (x, log_decay, phase)), backend="triton")
    assert "float8" in triton_scan.why_not(device, torch.float8_e4m3fn)


def test_without_triton_the_reason_is_named():
    code = """
import sys, torch
sys.modules["triton"] = None
from compressm.errors import BackendError
from compressm.kernels import diagonal_scan, gramians
one = torch.zeros(1, dtype=torch.cdouble)
for call in (
    lambda: diagonal_scan(torch.zeros(1, 3, 2), torch.zeros(1), torch.zeros(1), backend="triton"),
    lambda: gramians(one - 1, one[None], one[None], backend="triton"),
):
    try:
        call()
    except BackendError as error:
        assert "Triton is not installed" in str(error), error
    else:
        raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)
