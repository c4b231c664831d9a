"""Every Triton kernel compiles for every target, in the budget of registers, spills and instructions.

What it finds is recorded as properties of the tests (``pytest --junit-xml``); ``python tests/kernels/aot.py`` prints it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

TARGETS = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB of shared memory that a program may have


@pytest.fixture(scope="module")
def report():
    """What every target's compiler says, each in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))

    def compile_for(target: str) -> dict[str, Any]:
        command = [sys.executable, "-W", "error", str(ROOT / "tests" / "kernels" / "aot.py"), target]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout.splitlines()[-1])

    with ThreadPoolExecutor(min(os.cpu_count() or 1, len(TARGETS))) as pool:
        found = list(pool.map(compile_for, TARGETS))
    return {**found[0], "rows": [row for one in found for row in one["rows"]]}


@pytest.mark.parametrize("target", TARGETS)
def test_machine_code(report, target, record_property):
    rows = {row["kernel"]: row for row in report["rows"] if row["target"] == target}
    assert len(rows) >= 13
    for name, row in rows.items():
        record_property(name, row)
        budget = row["budget"]
        assert row["spills"] <= budget["spills"], row
        assert row["layout_conversions"] <= budget["conversions"], row
        assert row["registers"] <= budget["registers"], row
        assert row["shared_memory"] <= TARGETS[target] * 1024, row
        assert 4 <= row["per_element"] <= budget["instructions"], row


def test_no_shape_compiles_anew(report):
    assert report["specialized"] == []


def test_cpu_tensors_need_the_interpreter(report):
    assert all("run on a GPU" in reason for reason in report["why_not"])
