"""The package as a whole: inert import, floors, environment variables."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import compressm
from compressm import config
from compressm.errors import ConfigError

ROOT = Path(compressm.__file__).parent
FLOORS = {
    "_version": 0, "errors": 0, "config": 0, "inputs": 0, "kernels": 1, "layers": 2, "control": 2, "adapters": 3,
    "compression": 4, "experiments": 5, "integrations": 5, "references": 5, "benchmarking": 6, "doctor": 6, "cli": 7,
    "__main__": 8,
}  # fmt: skip
INNER = {
    "compression": {
        "common": 0, "surgery": 1, "distributed": 2, "planning": 3, "guard": 4, "compressor": 5, "saving": 6
    },
    "kernels": {"core": 0, "fused_cpu": 2, "planning": 3},
}  # fmt: skip
OPS_FLOOR = 1  # of every other folder in kernels/; ops may build on each other


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "compressm" and len(parts) > 1 else None


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_rooms_import_only_from_lower_floors():
    seen = 0
    for path in ROOT.rglob("*.py"):
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for module in imports(path):
            other = room(module)
            if other in FLOORS and other != own:
                seen += 1
                downward = FLOORS[other] < FLOORS[own] or (own, other) in (("config", "errors"), ("inputs", "errors"))
                assert downward, f"{path.relative_to(ROOT)} imports {module}"
    assert seen > 20


@pytest.mark.parametrize("package", INNER)
def test_inner_rooms_import_only_from_lower_floors(package):
    folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    floors = dict.fromkeys(folders, OPS_FLOOR) | INNER[package] if package == "kernels" else INNER[package]
    assert folders <= floors.keys()
    seen = 0
    for path in (ROOT / package).rglob("*.py"):
        own = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for module in imports(path):
            if module.startswith(f"compressm.{package}."):
                other = module.split(".")[2]
                seen += other != own
                assert other in floors, f"{path.relative_to(ROOT)} imports {module}, by way of its own package"
                assert floors[other] <= floors[own], f"{path.relative_to(ROOT)} imports {module}"
    assert seen > 20


def test_only_users_of_the_package_import_it_as_a_whole():
    """Its ``__init__`` knows every room: whoever lies below what it exports would import upwards."""
    highest = max(FLOORS[room(module)] for module in compressm._EXPORTS.values())
    for path in ROOT.rglob("*.py"):
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if own != "__init__" and FLOORS[own] < highest:
            assert "compressm" not in imports(path), path


def test_only_config_reads_the_environment():
    for path in ROOT.rglob("*.py"):
        if path.name != "config.py" or path.parent != ROOT:
            text = path.read_text()
            assert "os.environ" not in text, path
            assert "getenv" not in text, path


def test_import_is_inert():
    code = """
import os, sys
before = dict(os.environ)
sys.modules["triton"] = None
import torch
loaded = set(sys.modules)
import compressm
assert dict(os.environ) == before
new = {name.split(".")[0] for name in set(sys.modules) - loaded}
assert new <= {"compressm"} | set(sys.stdlib_module_names), new
assert not torch.cuda.is_initialized()
compressm.layers.LRU(2, 3)
assert "rich" not in sys.modules and "matplotlib" not in sys.modules
assert "torch._dynamo" not in sys.modules, "takes two seconds"
import compressm.integrations
assert not {"transformers", "lightning", "pytorch_lightning", "accelerate", "mamba_ssm"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT.parent)


def test_type_checkers_take_the_annotations():
    assert (ROOT / "py.typed").is_file()


def test_every_public_name_loads():
    for name in compressm.__all__:
        assert getattr(compressm, name) is not None
    assert set(compressm.__all__) <= set(dir(compressm))
    with pytest.raises(AttributeError, match="nothing"):
        _ = compressm.nothing


def test_environment_variables(monkeypatch):
    monkeypatch.delenv("COMPRESSM_BUILD_DIR", raising=False)
    monkeypatch.setenv("COMPRESSM_BACKEND", "reference")
    monkeypatch.setenv("COMPRESSM_DISABLE_CPP", "1")
    assert config.current() == config.Config("reference", None, False)
    monkeypatch.setenv("COMPRESSM_BACKEND", "cuda")
    with pytest.raises(ConfigError, match="COMPRESSM_BACKEND"):
        config.current()


def test_without_a_compiler_the_reference_runs_and_one_warning_says_so():
    code = """
import warnings, torch
from torch.utils import cpp_extension
cpp_extension.get_cxx_compiler = lambda: "/nonexistent/c++"
from compressm.layers import LRU
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    layer = LRU(4, 6)
    y = layer(torch.randn(2, 30, 4))
    layer(torch.randn(2, 30, 4))
assert layer.kernel_plan.backend == "reference", layer.kernel_plan
assert torch.isfinite(y).all()
ours = [str(w.message) for w in caught if "C++" in str(w.message)]
assert len(ours) == 1 and "compiler" in ours[0], ours
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


def test_rooms_of_compression_export_what_is_public():
    """What the changelog promises to those who import from a room."""
    for room in ("compressor", "guard", "planning", "saving", "surgery"):
        module = importlib.import_module(f"compressm.compression.{room}")
        assert module.__all__
        for name in module.__all__:
            assert getattr(module, name).__module__.startswith("compressm."), name
