"""The session for a GPU runs through on tiny shapes in Triton's interpreter, and says so where something is wrong."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compressm.kernels import OPS
from compressm.kernels.core.gpu import Check
from compressm.kernels.selective_scan.triton_launch import checkpoint_shape

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_session.py"


def session(out):
    """Run the program on the CPU, as a user would from a checkout."""
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--smoke", "--budget", "3000", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=out, check=False)


@pytest.fixture
def gpu(monkeypatch):
    """The program's modules."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


@pytest.mark.slow
def test_smoke(tmp_path, gpu, monkeypatch, capsys):
    run = session(tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    bodies = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("kernels", "layers", "train")}
    for name, body in bodies.items():
        assert body["complete"], body["skipped"]
        assert body["failed"] == []
        assert f"== {name}: 0 failed, 0 cut for time" in run.stdout
    kernels = bodies["kernels"]
    assert {row["op"] for row in kernels["checks"]} == {name for name, op in OPS.items() if op.gpu}
    assert all(row["ok"] and row["worst"] <= row["tolerance"] for row in kernels["checks"])
    assert {row["contender"] for row in kernels["speed"]} >= {"compressm backward, deterministic", "torch.compile forward"}
    assert all(row["median"] > 0 for row in kernels["speed"])
    assert len(kernels["sweep"]) == len({row["kernel"] for row in kernels["configurations"]}) == 4
    assert kernels["ceilings"].keys() == {"copy", "exponentials", "instructions", "matmul_bfloat16", "matmul_float32"}
    assert {(row["states"], row["pass"]) for row in bodies["layers"]["layers"]} >= {(3, "forward"), (2, "forward+backward")}
    assert {row["mode"] for row in bodies["train"]["train"]} == {"eager", "compile"}
    assert all(row["next"] for row in bodies["train"]["profile"])
    assert bodies["train"]["errors"].keys() == {"LRU N3", "LRU N2", "Mamba LM N2"}
    assert len(run.stdout.splitlines()) < 64

    import gpu_session

    before = {name: (tmp_path / f"{name}.json").read_text() for name in bodies}
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", "--device", "cpu", "--smoke", "--out", str(tmp_path)])
    assert gpu_session.main() == 0
    assert {name: (tmp_path / f"{name}.json").read_text() for name in bodies} == before, "complete parts ran again"
    assert "== kernels: 0 failed" in capsys.readouterr().out

    bodies["layers"]["failed"].append({"what": "LRU N3", "why": "relative error 1"})
    (tmp_path / "layers.json").write_text(json.dumps(bodies["layers"]))
    assert gpu_session.main() == 1
    assert "FAILED LRU N3: relative error 1" in capsys.readouterr().out


def test_wrong_kernels_are_failures(gpu, monkeypatch):
    from gpu import checks

    op = OPS["diagonal_scan"]

    def wrong(x, *rest, backend=None, **options):
        h = op.function(x, *rest, backend=backend, **options)
        return h if backend == "reference" else h * 1.001

    monkeypatch.setitem(OPS, "diagonal_scan", replace(op, function=wrong))
    row = checks.run("diagonal_scan", Check({"batch": 1, "length": 5, "states": 3}), "float32", "cpu")
    assert not row["ok"]
    assert row["worst"] == pytest.approx(1e-3, rel=0.1)
    row = checks.run("diagonal_scan", Check({"batch": 1, "length": 5}), "float32", "cpu")
    assert not row["ok"]
    assert "KeyError" in row["error"]


def test_every_full_case_can_be_made(gpu):
    """Shapes and options of the real run, on tensors without memory."""
    from gpu import checks, problems

    large = {}
    for name, op in checks.ops().items():
        for dtype in op.dtypes if len(op.dtypes) == 1 else (torch.float32, torch.bfloat16):
            for check in (*op.gpu_cases().checks(dtype), *op.gpu_cases().SMALL):
                assert all(t.is_meta for t in problems.problem(op, check, dtype, "meta").inputs.values())
        for check in op.gpu_cases().LARGE:
            inputs = problems.problem(op, check, torch.bfloat16, "meta").inputs
            large.setdefault(name, []).append((check.sizes, max(t.numel() for t in inputs.values())))
    found = {name: sum(count > 2**31 for _, count in cases) for name, cases in large.items()}
    expected = {"selective_scan": 3, "diagonal_scan": 2, "causal_conv1d": 1, "selective_state_update": 1}
    assert found.items() >= expected.items(), large
    sizes, _ = large["selective_scan"][3]
    batch, channels, length, states = (sizes[name] for name in ("batch", "channels", "length", "states"))
    assert math.prod(checkpoint_shape(batch, channels, length, states, False, batch)) > 2**31
    sizes, _ = large["gramians"][0]
    assert 8 * sizes["batch"] * sizes["states"] ** 2 > 2**31  # float64 numbers of four complex matrices


def test_counters_of_the_profiler(gpu):
    from gpu import tools

    log = (
        '==PROF== connected\n"ID","Kernel Name","Grid Size","Metric Name","Metric Unit","Metric Value"\n'
        '"0","_selective_scan_fwd_kernel","(384, 1, 1)","smsp__inst_executed.sum","inst","1,234"\n'
        '"0","_selective_scan_fwd_kernel","(384, 1, 1)","gpu__time_duration.sum","us","160.5"\n'
    )
    (launch,) = tools.parse_counters(log)
    assert launch["smsp__inst_executed.sum"] == 1234
    assert launch["gpu__time_duration.sum unit"] == "us"
    assert tools.parse_counters("no counters here") == []


def test_predictions_say_what_was_not_measured(gpu):
    from gpu import predictions

    speed = [
        {"op": "selective_scan", "shape": "B8 D1536 L2048 N16", "contender": "compressm forward", "median": 0.2},
        {"op": "selective_scan", "shape": "B8 D1536 L2048 N16", "contender": "mamba_ssm forward", "median": 0.27},
    ]
    rows = {row["what"]: row for row in predictions.table(speed, [])}
    beside = rows["mamba_ssm forward / ours, B8 D1536 L2048 N16"]
    assert beside["measured"] == pytest.approx(1.35)
    assert beside["holds"] is False
    assert rows["mamba_ssm forward / ours, B8 D1536 L2048 N128"]["holds"] is None


def test_the_table_is_short(gpu):
    import gpu_session

    lines = ["== kernels", *(f"row {n}" for n in range(100)), "== train", "FAILED x"]
    short = gpu_session.shortened(lines)
    assert len(short) <= 58
    assert {"== kernels", "== train", "FAILED x"} <= set(short)
    assert short[-1].startswith("... and")
