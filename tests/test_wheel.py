"""The wheel: what is in it, and that its sources are those that build the kernels."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from compressm.kernels.core import cpp

ROOT = Path(__file__).parents[1]
builders = pytest.importorskip("hatchling.builders.wheel")


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
