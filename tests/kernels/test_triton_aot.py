"""Every Triton kernel compiles for every target, in the budget of registers, spills and instructions.

What it finds is recorded as properties of the tests (``pytest --junit-xml``); ``python tests/kernels/aot.py`` prints it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Most registers a lane, and most instructions in the loop per element: a step of a complex state, (i, j, k) of a Gramian, or
# (for the whole kernel, with the branches that few programs take) an output of the convolution.
CUDA_BUDGET = {
    "scan_fwd_fp32": (72, 21),
    "scan_fwd_bf16": (72, 26),
    "scan_ends_bf16": (72, 17.5),
    "scan_bwd_fp32": (88, 35.5),
    "scan_bwd_bf16": (88, 44),
    "gramians": (72, 20),
    "conv_fwd_fp32": (48, 95),
    "conv_fwd_bf16": (48, 100),
    "conv_bwd_fp32": (88, 280),
    "conv_bwd_bf16": (88, 295),
    "selective_fwd_bf16": (208, 12.2),
    "selective_bwd_bf16": (255, 33),
    "state_update_bf16": (88, 48),
}
HIP_BUDGET = {  # Triton 3.6 masks every load with a branch of its own
    "scan_fwd_fp32": (64, 37),
    "scan_fwd_bf16": (64, 47),
    "scan_ends_bf16": (104, 27),
    "scan_bwd_fp32": (96, 115),
    "scan_bwd_bf16": (96, 130),
    "gramians": (128, 55),
    "conv_fwd_fp32": (40, 345),
    "conv_fwd_bf16": (40, 350),
    "conv_bwd_fp32": (72, 700),
    "conv_bwd_bf16": (72, 720),
    "selective_fwd_bf16": (176, 12.5),
    "selective_bwd_bf16": (288, 66),
    "state_update_bf16": (88, 56),
}
SM_90_BUDGET = CUDA_BUDGET | {
    "selective_fwd_bf16": (168, 12.2),  # three programs of 128 lanes a multiprocessor
    "selective_fwd_fp32": (168, 11.5),
    "selective_bwd_fp32": (255, 32.5),
    "selective_bwd_deterministic_bf16": (255, 35.5),
}
BUDGETS = {"sm_80": CUDA_BUDGET, "sm_90": SM_90_BUDGET, "sm_100": CUDA_BUDGET, "gfx942": HIP_BUDGET}

# Spilled bytes (registers on AMD) where there may be some: the selective scan's tile prologues, not the loop over states.
SPILLS = {
    "selective_bwd_bf16": 300,
    "selective_bwd_fp32": 300,
    "selective_bwd_deterministic_bf16": 300,
}
HIP_SPILLS = {"selective_fwd_bf16": 12, "selective_bwd_bf16": 60}

# Layout conversions where there may be some: the sums over channels, of a warp's (by shuffles) and of a program's.
CONVERSIONS = dict.fromkeys(SPILLS, 17) | {"state_update_bf16": 6}


@pytest.fixture(scope="module")
def report():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-W", "error", str(ROOT / "tests" / "kernels" / "aot.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("target", BUDGETS)
def test_machine_code(report, target, record_property):
    rows = {row["kernel"]: row for row in report["rows"] if row["target"] == target}
    assert rows.keys() == BUDGETS[target].keys()
    for name, (registers, instructions) in BUDGETS[target].items():
        record_property(name, rows[name])
        spills = HIP_SPILLS if target == "gfx942" else SPILLS
        assert rows[name]["spills"] <= spills.get(name, 0), rows[name]
        assert rows[name]["layout_conversions"] <= CONVERSIONS.get(name, 0), rows[name]
        assert rows[name]["registers"] <= registers, rows[name]
        assert 4 <= rows[name]["per_element"] <= instructions, rows[name]


def test_no_shape_compiles_anew(report):
    assert report["specialized"] == []


def test_cpu_tensors_need_the_interpreter(report):
    assert all("run on a GPU" in reason for reason in report["why_not"])
