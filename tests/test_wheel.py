"""The wheel: what is in it, and that its sources are those that build the kernels."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from compressm.kernels.core import cpp

ROOT = Path(__file__).parents[1]
builders = pytest.importorskip("hatchling.builders.wheel")

BARE = """
import json, socket, sys, warnings

def refuse(*_):
    raise OSError("there is no network")

socket.socket.connect = socket.getaddrinfo = refuse
warnings.simplefilter("error")
import torch, compressm
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    compressm.layers.LRU(4, 6)(torch.randn(2, 30, 4)).sum().backward()
    warned = [str(warning.message) for warning in caught]
print(json.dumps([compressm.__file__, warned]))
warnings.simplefilter("default")
from compressm.__main__ import main
sys.argv = ["compressm", *sys.argv[1:]]
main()
"""


def build(folder):
    (path,) = builders.WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return Path(path)


def test_a_wheel_brings_the_package_its_data_and_the_sources_of_its_kernels(tmp_path, monkeypatch):
    monkeypatch.delenv("COMPRESSM_PREBUILD", raising=False)
    wheel = build(tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {path for path in (ROOT / "compressm").rglob("*") if path.is_file() and path.suffix in (".py", ".bib", ".j2")}
    assert {path.relative_to(ROOT).as_posix() for path in package} <= names
    assert "compressm/py.typed" in names
    sources = {f"compressm/_csrc/{path.relative_to(ROOT / 'csrc').as_posix()}" for path in cpp._sources(ROOT / "csrc")}
    assert sources == {name for name in names if name.startswith("compressm/_csrc/")}
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    assert names - sources <= {path.relative_to(ROOT).as_posix() for path in (ROOT / "compressm").rglob("*")}


def test_sources_in_a_wheel_and_in_a_checkout_make_the_same_library(tmp_path):
    zipfile.ZipFile(build(tmp_path)).extractall(tmp_path)
    assert cpp._digest_of(tmp_path / "compressm/_csrc", "") == cpp._digest_of(ROOT / "csrc", "")


def test_a_prebuilt_wheel_without_a_compiler_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESSM_PREBUILD", "1")
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(RuntimeError, match=r"C\+\+20 compiler"):
        build(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("doctor", "no C++ compiler found"),
        pytest.param("train digits --steps 20 --set runs=compressed,small --out runs", "report: runs", marks=pytest.mark.slow),
    ],
)
def test_an_installation_works_without_network_compiler_git_and_home(tmp_path, command, says):
    place = tmp_path / "with a space"
    zipfile.ZipFile(build(tmp_path)).extractall(place)
    environment = {"PATH": "/nonexistent", "HOME": "/dev/null/home", "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BARE, *command.split()], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, _, printed = done.stdout.partition("\n")
    package, warned = json.loads(first)
    assert Path(package).parent == place / "compressm"
    assert ["no C++ compiler found" in text for text in warned] == [True]
    assert says in printed
    assert printed.endswith("\n")
