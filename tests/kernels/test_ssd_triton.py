"""Mamba-2's scan in Triton, on a GPU or in the interpreter, against the float64 definition: outputs and every gradient."""

from __future__ import annotations

import math

import pytest
import torch
from kernels.evaluation import check
from kernels.ssd_cases import GOLDEN, TENSORS, evaluate, numbered, random_inputs

from compressm.errors import BackendError
from compressm.kernels import plan, ssd
from compressm.kernels.ssd import triton_launch
from compressm.kernels.ssd.op import ssd_op

pytestmark = pytest.mark.usefixtures("poisoned_memory")
HALF = ("x", "dt", "B", "C", "z")


@pytest.fixture
def configure(monkeypatch):
    """Run chunks of T steps in tiles of BP x BN, a few heads a program, whatever the shapes."""

    def set_config(T, BP, BN, few):
        config = {"T": T, "BP": BP, "BN": BN, "few": few, "threads": 4 * T, "stages": 1}
        monkeypatch.setattr(triton_launch, "chunk_steps", lambda *_: T)
        monkeypatch.setattr(triton_launch, "_config", lambda *_: config)

    return set_config


def compare(inputs, assert_close, device, dtype=torch.float32, **options):
    inputs = {k: t.to(dtype).double() if t is not None and k in HALF else t for k, t in inputs.items()}
    oracle = evaluate(inputs, torch.float64, "reference", **options)
    options = {k: t.to(device) if isinstance(t, torch.Tensor) else t for k, t in options.items()}
    results = evaluate(inputs, dtype, "triton", device=device, **options)
    check(results, oracle, assert_close, dtype)
    assert all(t.dtype == (dtype if name in ("out", *HALF) else torch.float32) for name, t in results.items())


@pytest.mark.parametrize("shape", [(2, 1, 1, 5, 1, 5), (1, 33, 2, 16, 1, 13), (1, 65, 2, 5, 2, 40)], ids=str)
def test_ssd(assert_close, device, shape):
    compare(random_inputs(*shape), assert_close, device)


def test_limits_and_a_skip_for_every_channel(assert_close, device):
    inputs = random_inputs(1, 20, 2, 5, 1, 5, wide_skip=True, without=["z"])
    compare(inputs, assert_close, device, dt_limit=(0.05, 0.3))


def test_a_step_size_that_is_no_number_shows(device):
    inputs = {k: t.float().to(device) for k, t in random_inputs(1, 20, 2, 3, 1, 5).items()}
    inputs["dt"][0, 7, 1] = math.nan
    out, last = ssd(**inputs, dt_softplus=True, return_final_states=True, backend="triton")
    assert torch.isnan(out[0, 7:, 1]).all()
    assert torch.isnan(last[0, 1]).all()
    assert torch.isfinite(out[0, :, 0]).all()


@pytest.mark.parametrize("without", [("D", "z", "dt_bias", "initial_states"), ("D",), ("z", "dt_bias")], ids=str)
def test_without_optional_arguments(assert_close, device, without):
    inputs = random_inputs(1, 20, 1, 3, 1, 5, without=without)
    inputs["dt"] = inputs["dt"].abs() * 0.1
    compare(inputs, assert_close, device, dt_softplus="dt_bias" in without and "D" not in without)


@pytest.mark.parametrize(
    ("config", "shape"), [((16, 16, 16, 2), (1, 17, 3, 17, 1, 21)), ((32, 32, 16, 3), (1, 20, 3, 17, 1, 5))], ids=str
)
def test_every_tile(assert_close, device, config, shape, configure):
    configure(*config)
    compare(random_inputs(*shape), assert_close, device)


@pytest.mark.parametrize(("chunk", "steps"), [(1, 16), (16, 16), (40, 32), (256, 64)])
def test_chunks_of_a_given_length(assert_close, device, chunk, steps, monkeypatch):
    seen, chunks_of = [], triton_launch.chunks_of
    monkeypatch.setattr(triton_launch, "chunks_of", lambda *given: seen.append(given[3]) or chunks_of(*given))
    compare(random_inputs(1, 40, 1, 3, 1, 5), assert_close, device, chunk_size=chunk)
    assert seen == [steps, steps]  # forward and backward


@pytest.mark.parametrize(
    ("bounds", "integer"), [([0, 7, 7, 40, 41], torch.int32), ([0, 0, 32, 64], torch.int64)], ids=["uneven", "whole"]
)
def test_packed_sequences(assert_close, device, bounds, integer):
    inputs = random_inputs(1, bounds[-1], 1, 5, 1, 5, sequences=len(bounds) - 1)
    compare(inputs, assert_close, device, cu_seqlens=torch.tensor(bounds, dtype=integer))


@pytest.mark.parametrize("starts", [([3, 32], [31, 64]), (range(0, 70, 2),)], ids=["few", "many"])
def test_numbered_sequences(assert_close, device, starts):
    compare(random_inputs(len(starts), 70, 1, 3, 1, 5), assert_close, device, seq_idx=numbered(70, *starts))


@pytest.mark.parametrize(
    ("dtype", "sizes"), [(torch.bfloat16, (16, 40)), (torch.bfloat16, (5, 13)), (torch.float16, (16, 40))], ids=str
)
def test_half_precision(assert_close, device, dtype, sizes):
    compare(random_inputs(1, 40, 2, sizes[0], 1, sizes[1]), assert_close, device, dtype)


def test_inputs_of_several_dtypes(assert_close, device):
    inputs = random_inputs(1, 20, 1, 5, 1, 5)
    dtypes = {"x": torch.bfloat16, "B": torch.float32, "C": torch.bfloat16, "dt": torch.float32, "A": torch.bfloat16}
    given = {name: t.to(dtypes.get(name, torch.float32)) for name, t in inputs.items()}
    oracle = evaluate({name: t.double() for name, t in given.items()}, torch.float64, "reference")
    results = evaluate(given, None, "triton", device=device)
    check(results, oracle, assert_close, torch.bfloat16)
    assert all(results[name].dtype == dtype for name, dtype in dtypes.items())


@pytest.mark.parametrize("name", GOLDEN[:1])
def test_golden(golden, assert_close, device, name):
    g = golden(name)
    leaves = {key: g[key].to(device, torch.float32).requires_grad_() for key in TENSORS}
    options = {"dt_softplus": True, "dt_limit": tuple(g["dt_limit"].tolist()), "return_final_states": True}
    out, last = ssd(**leaves, **options, backend="triton")
    assert_close(out.detach().cpu(), g["out"], "out")
    assert_close(last.detach().cpu(), g["last_state"], "last state")
    weights = g["w"].to(out), g["w_state"].to(last)
    for key, gradient in zip(leaves, torch.autograd.grad((out, last), list(leaves.values()), weights), strict=True):
        assert_close(gradient.cpu(), g[f"grad_{key}"], key)


def test_slices_transposes_and_expanded_gradients(assert_close, device):
    """x, B and C as a layer cuts them out of one projection; z that lies with L last; no gradient of the final states."""
    inputs = random_inputs(1, 20, 2, 8, 1, 8)
    joined = torch.cat([inputs["x"].flatten(2), inputs["B"].flatten(2), inputs["C"].flatten(2)], 2)
    oracle = {k: t.clone().requires_grad_() for k, t in inputs.items()}
    ssd(**oracle, dt_softplus=True, backend="reference").sum().backward()
    both = joined.float().to(device).requires_grad_()
    leaves = {k: t.float().to(device).requires_grad_() for k, t in inputs.items() if k not in "xBC"}
    x, B, C = both.split((16, 8, 8), 2)
    z = leaves["z"].movedim(1, 3).contiguous().movedim(3, 1)
    views = {"x": x.unflatten(2, (2, 8)), "B": B.unflatten(2, (1, 8)), "C": C.unflatten(2, (1, 8)), "z": z}
    ssd(**leaves | views, dt_softplus=True, backend="triton").sum().backward()
    expected = torch.cat([oracle[name].grad.flatten(2) for name in "xBC"], 2)
    assert_close(both.grad.cpu(), expected, "x, B and C")
    for name, leaf in leaves.items():
        assert_close(leaf.grad.cpu(), oracle[name].grad, name)


def test_same_bits_every_time(device, configure):
    configure(16, 16, 16, 1)
    inputs = random_inputs(1, 20, 2, 3, 1, 5)
    first, second = (evaluate(inputs, torch.float32, "triton", device=device) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


EMPTY = [(0, 6, 4, 3, 2, 5), (2, 0, 4, 3, 2, 5), (2, 6, 0, 3, 2, 5), (2, 6, 4, 0, 2, 5), (2, 6, 4, 3, 2, 0)]


@pytest.mark.parametrize("shape", EMPTY, ids=["batch", "L", "H", "P", "N"])
def test_nothing_to_scan(shape, assert_close, device):
    compare(random_inputs(*shape), assert_close, device)


@pytest.mark.parametrize("packed", [False, True])
def test_custom_op_is_well_formed(device, packed):
    inputs = random_inputs(1, 20, 1, 3, 1, 4, sequences=3 if packed else 1)
    arguments = [t.float().to(device).requires_grad_() for t in inputs.values()]
    bounds = torch.tensor([0, 3, 3, 20], device=device) if packed else None
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    settings = (True, 0.0, math.inf, True, 0.5, 0, "triton")
    torch.library.opcheck(ssd_op.op, (*arguments, None, bounds, *settings), test_utils=tests)


def test_plans_are_consistent(device):
    for states in (1, 16, 17, 100, 300):
        for channels, heads, groups in ((1, 1, 1), (64, 24, 1), (65, 80, 8), (128, 16, 16)):
            for batch, length in ((1, 1), (1, 4096), (64, 65)):
                for dtype in (torch.float32, torch.bfloat16):
                    shapes = {"x": (batch, length, heads, channels), "B": (batch, length, groups, states)}
                    chosen = plan("ssd", shapes, dtype, device, "triton")
                    assert 1 <= chosen.get("few") <= heads // groups
                    assert {chosen.get(key) for key in ("T", "BP", "BN")} <= {16, 32, 64}
                    assert chosen.get("threads") % 64 == 0
    shapes = [{"x": (1, length, 24, 64), "B": (1, length, 1, 128)} for length in (64, 1 << 14, 1 << 17)]
    assert [plan("ssd", shape, torch.float32, device, "triton").get("few") for shape in shapes] == [1, 12, 24]


def test_keys_fetch_tiles_ahead_where_there_are_several_and_room():
    stages = {}
    for states, width in ((16, 64), (16, 128), (128, 64), (128, 128)):
        config = triton_launch._config(1024, 24, 1, width, states, True, triton_launch.chunk_steps(states))
        stages[states, width] = triton_launch.keys_stages(config, width)
    assert stages == {(16, 64): 1, (16, 128): 1, (128, 64): 1, (128, 128): 2}


def test_calls_that_triton_cannot_run_say_why(device):
    inputs = {k: t.to(device) for k, t in random_inputs().items()}
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        ssd(**inputs, backend="triton")
    assert "float8" in triton_launch.why_not(device, torch.float8_e4m3fn)
