"""The Triton selective scan, on a GPU or in the interpreter, against the float64 definition: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from kernels.evaluation import check
from kernels.selective_scan_cases import TENSORS, evaluate, random_inputs

from compressm.errors import BackendError
from compressm.kernels import selective_scan, selective_state_update
from compressm.kernels.selective_scan import triton_launch as triton_scan

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=[False, True], ids=["atomic", "deterministic"])
def deterministic(request, poisoned_memory):
    torch.use_deterministic_algorithms(request.param, warn_only=True)


@pytest.fixture
def configure(monkeypatch):
    """Run tiles of T steps and R row blocks of BD channels, whatever the shapes."""

    def set_config(R, BD, T):
        config = {"R": R, "BD": BD, "T": T, "threads": BD * T // 8}
        monkeypatch.setattr(triton_scan, "_tile_steps", lambda *_: T)
        monkeypatch.setattr(triton_scan, "_config", lambda *_: config)

    return set_config


def compare(inputs, assert_close, device, dtype=torch.float32, **options):
    half = ("u", "delta", "B", "C", "z")
    inputs = {k: t.to(dtype).double() if t is not None and k in half else t for k, t in inputs.items()}
    oracle = evaluate(inputs, torch.float64, "reference", **options)
    if "cu_seqlens" in options:
        options["cu_seqlens"] = options["cu_seqlens"].to(device)
    results = evaluate(inputs, dtype, "triton", device=device, **options)
    check(results, oracle, assert_close, dtype)
    assert results["out"].dtype == results["u"].dtype == results["B"].dtype == dtype
    assert results["last"].dtype == torch.float32
    return results


@pytest.mark.parametrize(
    "shape",
    [(2, 1, 1, 1, 1), (1, 3, 33, 5, 1), (1, 17, 65, 3, 1), (2, 3, 130, 2, 1), (1, 16, 64, 13, 1), (1, 6, 72, 3, 2)],
    ids=str,
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_selective_scan(assert_close, device, shape, channels_last):
    compare(random_inputs(*shape, channels_last=channels_last), assert_close, device)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups(assert_close, device, groups, deterministic):
    compare(random_inputs(1, 4, 33, 3, groups), assert_close, device)


@pytest.mark.parametrize("config", [(1, 4, 64), (2, 16, 64), (1, 8, 128), (2, 8, 128), (2, 4, 256)], ids=str)
def test_every_tile(assert_close, device, config, configure, deterministic):
    configure(*config)
    compare(random_inputs(1, 24, config[2] + 8, 2, 2), assert_close, device)


@pytest.mark.parametrize("channels_last", [False, True])
def test_whole_blocks_of_aligned_channels(assert_close, device, channels_last, configure):
    configure(2, 8, 64)
    compare(random_inputs(1, 16, 128, 2, channels_last=channels_last), assert_close, device)


@pytest.mark.parametrize("name", ["D", "z", "delta_bias", "initial_state"])
def test_without_an_optional_argument(assert_close, device, name):
    compare(random_inputs(1, 3, 33, 2, without=[name]), assert_close, device)


def test_step_sizes_without_softplus(assert_close, device):
    inputs = random_inputs(1, 3, 33, 2, without=["delta_bias"])
    inputs["delta"] = inputs["delta"].abs() * 0.1
    compare(inputs, assert_close, device, delta_softplus=False)


@pytest.mark.parametrize("bounds", [[0, 7, 7, 72, 73, 200], [0, 64, 128, 200], [0, 0, 5, 5]], ids=str)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_packed_sequences(assert_close, device, bounds, integer, deterministic):
    inputs = random_inputs(1, 3, bounds[-1], 2, sequences=len(bounds) - 1)
    compare(inputs, assert_close, device, cu_seqlens=torch.tensor(bounds, dtype=integer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [65, 72])
@pytest.mark.parametrize("channels_last", [False, True])
def test_half_precision(assert_close, device, dtype, length, channels_last):
    results = compare(random_inputs(1, 8, length, 3, channels_last=channels_last), assert_close, device, dtype)
    assert results["A"].dtype == torch.float32


def test_golden(golden, assert_close, device):
    g = golden("scan_B2_D3_L33_N5_G1")
    leaves = {key: g[key].to(device, torch.float32).requires_grad_() for key in TENSORS if key in g}
    out, last = selective_scan(**leaves, delta_softplus=True, return_last_state=True, backend="triton")
    assert_close(out.detach().cpu(), g["out"], "out")
    assert_close(last.detach().cpu(), g["last_state"], "last state")
    gradients = torch.autograd.grad((out * g["w"].to(out)).sum(), list(leaves.values()))
    for key, gradient in zip(leaves, gradients, strict=True):
        assert_close(gradient.cpu(), g[f"grad_{key}"], key)


def test_inference_is_the_forward_of_training(device):
    inputs = {k: t.float().to(device) for k, t in random_inputs(2, 3, 130, 3).items()}
    with torch.no_grad():
        out, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True, backend="triton")
    again, end = selective_scan(**inputs, delta_softplus=True, return_last_state=True, backend="triton")
    assert torch.equal(out, again)
    assert torch.equal(last, end)


def test_views_and_expanded_gradients(assert_close, device):
    inputs = random_inputs(1, 8, 40, 2)
    pair = torch.randn(1, 16, 40, dtype=torch.float64)
    inputs["u"], inputs["z"] = pair.chunk(2, 1)
    oracle = {k: t.clone().requires_grad_() for k, t in inputs.items()}
    both = pair.float().to(device).requires_grad_()
    leaves = {k: t.float().to(device) for k, t in inputs.items()}
    leaves["u"], leaves["z"] = both.chunk(2, 1)
    selective_scan(**oracle, delta_softplus=True, backend="reference").sum().backward()
    selective_scan(**leaves, delta_softplus=True, backend="triton").sum().backward()
    assert_close(both.grad.cpu(), torch.cat([oracle["u"].grad, oracle["z"].grad], 1), "u and z")


def test_same_bits_every_time_in_deterministic_mode(device):
    inputs = random_inputs(2, 9, 40, 3)
    first, second = (evaluate(inputs, torch.float32, "triton", device=device) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("shape", [(0, 3, 6, 4), (2, 3, 0, 4), (2, 0, 6, 4), (2, 3, 6, 0)], ids=["batch", "L", "D", "N"])
def test_nothing_to_scan(shape, assert_close, device):
    inputs = random_inputs(*shape)
    check(
        evaluate(inputs, torch.float32, "triton", device=device),
        evaluate(inputs, torch.float64, "reference"),
        assert_close,
        torch.float32,
    )


@pytest.mark.parametrize("packed", [False, True])
def test_custom_ops_are_well_formed(device, packed):
    inputs = {
        k: t.float().to(device).requires_grad_() for k, t in random_inputs(1, 3, 33, 3, sequences=2 - (not packed)).items()
    }
    bounds = torch.tensor([0, 20, 33], device=device) if packed else None
    arguments = (*inputs.values(), bounds, True, True, "triton")
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.compressm.selective_scan.default, arguments, test_utils=tests)


def test_configurations_are_consistent():
    for batch in (1, 3, 64):
        for channels in (1, 24, 768, 5120):
            for states in (1, 16, 100, 300):
                for length in (1, 65, 4096):
                    plan = triton_scan.plan(batch, channels, length, states, torch.bfloat16)
                    lanes = plan.get("T") // 8
                    assert plan.get("threads") == plan.get("BD") * lanes
                    assert plan.get("threads") % 32 == 0
                    slots = triton_scan.checkpoint_shape(batch, channels, length, states, False, batch)[0]
                    assert slots >= batch * (-(-length // plan.get("T")) + 1)
    assert "R=2" in str(triton_scan.plan(8, 1536, 2048, 16, torch.bfloat16))


def test_calls_that_triton_cannot_run_say_why(device):
    inputs = {k: t.to(device) for k, t in random_inputs(1, 3, 4, 2).items()}
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        selective_scan(**inputs, backend="triton")
    assert "constant" in triton_scan.why_not(device, torch.float32, True)
    assert "float8" in triton_scan.why_not(device, torch.float8_e4m3fn, False)


@pytest.mark.parametrize("shape", [(2, 3, 1, 1, 1), (1, 6, 1, 5, 2), (2, 130, 1, 13, 1), (1, 9, 1, 150, 3)], ids=str)
@pytest.mark.parametrize("without", [(), ("D", "z", "delta_bias")], ids=["all", "bare"])
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_state_update(assert_close, device, shape, without, softplus, strided):
    inputs = random_inputs(*shape, without=without if softplus else (*without, "delta_bias"))
    inputs["delta"] = inputs["delta"] if softplus else inputs["delta"].abs()
    inputs = {k: t[..., 0] if t is not None and k in ("u", "delta", "z", "B", "C") else t for k, t in inputs.items()}
    expected = inputs.pop("initial_state")
    out = selective_state_update(expected, *inputs.values(), softplus, backend="reference")
    expected_start = random_inputs(*shape)["initial_state"].float().to(device)
    state = expected_start.transpose(0, 2).contiguous().transpose(0, 2) if strided else expected_start
    given = [None if t is None else t.float().to(device) for t in inputs.values()]
    result = selective_state_update(state, *given, softplus, backend="triton")
    assert_close(result.cpu(), out, "out")
    assert_close(state.cpu(), expected, "state")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_update_in_half_precision(assert_close, device, dtype):
    inputs = {k: t.to(dtype) for k, t in random_inputs(2, 20, 1, 5).items()}
    arguments = [t[..., 0] if k in ("u", "delta", "z", "B", "C") else t for k, t in inputs.items()]
    *wide, expected = (t.double() for t in arguments)
    out = selective_state_update(expected, *wide, True, backend="reference")
    state = arguments[-1].to(device)
    result = selective_state_update(state, *(t.to(device) for t in arguments[:-1]), True, backend="triton")
    assert result.dtype == state.dtype == dtype
    assert_close(result.cpu(), out, "out")
    assert_close(state.cpu(), expected, "state")
