"""Every example, as a user runs it, on tiny settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = {
    "plain_loop": ["--steps", "12", "--d-state", "12"],
    "lightning_callback": ["--epochs", "1", "--d-state", "12"],
    "transformers_trainer": ["--steps", "8", "--length", "24", "--state-size", "8", "--keep", "3"],
    "fine_tune_hybrid": ["--steps", "8", "--length", "24"],
}
NEEDS = {
    "lightning_callback": ["lightning"],
    "transformers_trainer": ["transformers", "accelerate"],
    "fine_tune_hybrid": ["transformers", "accelerate"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_example(name):
    for package in NEEDS.get(name, []):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    script = ROOT / "examples" / f"{name}.py"
    assert len(script.read_text().splitlines()) <= 60
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *TINY[name]], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    reductions = re.findall(r"(\d+) -> (\d+) states", done.stdout)
    assert reductions, done.stdout
    assert all(int(after) < int(before) for before, after in reductions)


def test_every_example_is_run():
    own = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert own >= set(TINY)
