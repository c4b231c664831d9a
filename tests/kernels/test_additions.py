"""An op is added by adding a folder: the plan, the command's choices, the bench and the tests of correctness find it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import compressm

PACKAGE = Path(compressm.__file__).parent
OP = '''
"""Exponential moving average."""

import torch

from compressm.kernels.core.custom_op import custom_op
from compressm.kernels.core.dispatch import Candidate, chooser
from compressm.kernels.core.op import Cost, Op, Sample
from compressm.kernels.core.plan import KernelPlan

choose_backend = chooser("ema", lambda device, dtype: [Candidate("reference", lambda: None)])


def ema(x: torch.Tensor, decay: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """h_t = decay h_{t-1} + (1 - decay) x_t of x (batch, L, D), decay (D,)."""
    choose_backend(x.device.type, x.dtype, backend=backend)
    h, out = torch.zeros_like(x[:, 0]), []
    for step in x.unbind(1):
        h = decay * h + (1 - decay) * step
        out.append(h)
    return torch.stack(out, 1).to(x.dtype)


def draw(sizes, dtype, device):
    x = torch.randn(sizes["batch"], sizes["length"], sizes["features"], device=device).to(dtype)
    return Sample({"x": x, "decay": torch.rand(sizes["features"], device=device)}, {}, {"batch": {"x": 0, "out": 0}})


def cost(sizes, word, backward):
    cells = sizes["batch"] * sizes["length"] * sizes["features"]
    return Cost((5 if backward else 2) * word * cells, 3 * cells, 0)


def plan(shapes, dtype, device, backend):
    return KernelPlan("ema", choose_backend(device, dtype, backend=backend), "loop")


OPS = (
    Op(
        name="ema", title="Moving average", about="an exponential moving average", function=ema,
        sizes={"batch": 2, "length": 16, "features": 8}, small=({"batch": 2, "length": 5, "features": 3},),
        draw=draw, cost=cost, plan=plan, shapes={"x": "(batch, L, D)"},
    ),
)
'''


def test_a_folder_is_all_that_an_op_takes(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "compressm", ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path / "compressm" / "kernels" / "ema"
    folder.mkdir()
    (folder / "__init__.py").write_text(OP)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "COMPRESSM_DISABLE_CPP": "1"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    code = "from compressm import kernels; print(kernels.plan('ema', {'x': (2, 9, 4)}))"
    assert run("-c", code) == "ema: reference loop\n"
    assert "ema," in " ".join(run("-m", "compressm", "bench", "--help").replace("│", " ").split())
    table = run("-m", "compressm", "bench", "ema", "--length", "4", "--size", "features=3", "--rounds", "2")
    assert "ema forward+backward, float32, batch 2, length 4, features 3" in " ".join(table.split())
    assert "reference loop" in table
    tests = Path(__file__).parents[1]
    for name in ("conftest.py", "global_state.py", "kernels/conftest.py", "kernels/test_records.py"):
        (tmp_path / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tests / name, tmp_path / "tests" / name)
    shutil.copy(PACKAGE.parent / "pyproject.toml", tmp_path)
    assert "5 passed" in run("-m", "pytest", "tests/kernels/test_records.py", "-k", "ema", "-p", "no:cacheprovider")
