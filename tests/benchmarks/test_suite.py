"""A part of make bench from end to end: pytest-benchmark and the result file hold the same figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import compressm
from compressm.benchmarking.results import Run

ROOT = Path(compressm.__file__).parents[1]
CHOSEN = "selective_state_update_B16_D512_N12_forward and (compressm or reference or ssm)"


def bench(out, *arguments):
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--bench-seconds", "0.02", "--bench-out", out]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}  # it measures by itself
    return subprocess.run([*command, *arguments], cwd=ROOT, env=own, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_samples_of_both_reports_agree_and_a_run_can_go_on(tmp_path):
    out, tables = tmp_path / "cpu.json", tmp_path / "benchmark.json"
    done = bench(out, "-k", CHOSEN, "--benchmark-json", tables)
    assert done.returncode == 0, done.stdout + done.stderr
    run, table = Run.load(out), json.loads(tables.read_text())
    assert [r.contender for r in run.results] == ["compressm", "reference loop"]
    medians = {b["name"].partition("-")[2][:-1]: 1e3 * b["stats"]["median"] for b in table["benchmarks"]}
    assert medians == {
        r.contender.replace(" ", "_"): pytest.approx(r.milliseconds.median, rel=1e-6) for r in run.results
    }
    assert {b["group"] for b in table["benchmarks"]} == {run.results[0].group}
    assert {m.contender for m in run.skipped} == {"mamba_ssm, CUDA kernel"}
    assert run.machine["matmul_1024_ms"]["best"] > 0
    assert "error" in done.stdout
    assert "of the limit" in done.stdout

    again = bench(out, "-k", CHOSEN, "--bench-resume")
    assert again.returncode == 0, again.stdout
    anew = run.machine["commit"].endswith("-dirty") or not run.machine["commit"]
    assert (Run.load(out).results == run.results) != anew


@pytest.mark.slow
def test_without_timing_the_answers_are_judged(tmp_path):
    out = tmp_path / "cpu.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-disable", "--bench-out", out, "-k", CHOSEN]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout
    assert "about" in done.stdout
    assert not out.exists()
