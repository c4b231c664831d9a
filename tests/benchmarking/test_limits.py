"""Ceilings that a machine can have, counts that agree with the formulas, limits that follow from both."""

from __future__ import annotations

import ctypes

import pytest
import torch

from compressm.benchmarking import counts, limits
from compressm.benchmarking.limits import limit_of, measure_ceilings
from compressm.benchmarking.results import Ceilings, Counts, Milliseconds, Result

CEILINGS = Ceilings(copy_gb_per_s=10.0, matmul_gflop_per_s=100.0, exp_g_per_s=1.0)


def test_the_slowest_resource_is_the_limit():
    assert limit_of(Counts(bytes=10**7, flops=10**7, exponentials=0), CEILINGS) == (1.0, "bytes")
    assert limit_of(Counts(bytes=0, flops=10**9, exponentials=10**6), CEILINGS) == (10.0, "flops")
    assert limit_of(Counts(bytes=1, flops=1, exponentials=3 * 10**6), CEILINGS) == (3.0, "exponentials")
    assert limit_of(Counts(bytes=0, flops=0, exponentials=0), CEILINGS) == (None, None)


def test_the_highest_ceilings_count_for_all_results():
    slow = CEILINGS.model_copy(update={"copy_gb_per_s": 5.0, "exp_g_per_s": 2.0})
    best = limits.higher(CEILINGS, slow)
    assert best == Ceilings(copy_gb_per_s=10.0, matmul_gflop_per_s=100.0, exp_g_per_s=2.0)
    times = Milliseconds(median=4.0, low=4.0, high=4.0, minimum=4.0, rounds=1)
    result = Result(
        group="g", op="lru", level="layer", shape={}, dtype="float32", passes="forward", contender="compressm", error=0.0,
        milliseconds=times, counts=Counts(bytes=10**7, flops=0, exponentials=0), limit_ms=2.0, limit_by="bytes",
    )  # fmt: skip
    assert limits.limited_by(result, best).share_of_limit == 0.25


def test_ceilings_of_this_machine(monkeypatch):
    monkeypatch.setattr(limits, "REPEATS", 2)
    found = measure_ceilings("cpu")
    assert 0.1 < found.copy_gb_per_s < 2000
    assert 0.5 < found.matmul_gflop_per_s < 20000
    assert 0.02 < found.exp_g_per_s < 2000
    monkeypatch.setattr(limits, "_compiled_exponentials", lambda: None)
    assert 1e6 < limits._cpu_exponentials() < 1e12


def test_the_loop_is_compiled_once_where_there_is_a_compiler(monkeypatch):
    commands, run = [], limits.subprocess.run

    def recording(command, **options):
        commands.append(command)
        return run(command, **options)

    monkeypatch.setattr(limits.subprocess, "run", recording)
    monkeypatch.setattr(limits, "REPEATS", 1)
    limits._compiled_exponentials.cache_clear()
    limits._cpu_exponentials()
    compiled = len(commands)
    limits._cpu_exponentials()
    assert len(commands) == compiled
    monkeypatch.setattr(limits.shutil, "which", lambda name: None)
    assert limits._compiled_exponentials.__wrapped__() is None


def test_the_compiled_loop_computes_powers_of_two():
    function = limits._compiled_exponentials()
    if function is None:
        pytest.skip("no C++ compiler")
    x = torch.linspace(-20, 5, 1001)
    out = torch.empty_like(x)
    function(x.data_ptr(), out.data_ptr(), x.numel(), ctypes.c_long(2))
    torch.testing.assert_close(out, torch.exp2(x), rtol=5e-7, atol=0)


def test_the_triton_loop_sums_powers_of_two():
    from compressm.benchmarking._exponentials_triton import exponentials

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.linspace(-1, 0, 2048, device=device)
    out = torch.empty_like(x)
    exponentials(x, out, 8)
    expected = sum(torch.exp2(x - shift - 0.001 * step) for shift in range(4) for step in range(2))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=0)


def test_counts_of_a_selective_scan():
    sizes = {"batch": 2, "length": 100, "channels": 8, "states": 16}
    forward = counts.of_op("selective_scan", sizes, 4, False)
    cells, wide = 2 * 100 * 8 * 16, 2 * 100 * 8
    assert forward.exponentials == cells + 3 * wide
    assert forward.flops == 6 * cells + 8 * wide
    assert forward.bytes == 4 * (4 * wide + 2 * 2 * 100 * 16) + 4 * 8 * (16 + 2)
    both = counts.of_op("selective_scan", sizes, 4, True)
    assert both.exponentials == 2 * forward.exponentials
    assert both.flops > 3 * forward.flops
    half = counts.of_op("selective_scan", sizes, 2, False)
    assert half.flops == forward.flops
    assert half.bytes < forward.bytes


def test_counts_of_an_lti_scan_are_its_matrix_products_where_channels_are_many():
    batch, length, channels, states = 2, 64, 512, 384
    sizes = {"batch": batch, "length": length, "channels": channels, "states": states}
    product = 2 * batch * length * channels * 2 * states  # one real product of (rows, H) and (H, 2N)
    forward = counts.of_op("lti_scan", sizes, 4, False)
    assert forward.flops == pytest.approx(2 * product, rel=0.01)
    assert counts.of_op("lti_scan", sizes, 4, True).flops == pytest.approx(6 * product, rel=0.01)
    assert forward.bytes == 4 * (2 * batch * length * channels + 4 * channels * states + 3 * states + channels)


def test_sums_and_multiples():
    one = counts.linear(10, 3, 4, False)
    assert counts.scaled(one, 3) == counts.add(one, one, one)
    assert counts.linear(10, 3, 4, True) == counts.scaled(one, 3)
    assert counts.mamba(1, 10, 16, 4, 4, True).flops > 2 * counts.mamba(1, 10, 16, 4, 4, False).flops
