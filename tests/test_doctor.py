"""compressm doctor, on machines that lack something."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from experiments.cli_cases import run
from torch.utils import cpp_extension

from compressm import doctor
from compressm.errors import EXTRAS
from compressm.kernels import OPS
from compressm.kernels.core import cpp

CPU = "CPU, float32, bfloat16, float16"


@pytest.fixture
def nothing_built(tmp_path, monkeypatch):
    """As if no library had been built, and none can be without this test noticing."""
    monkeypatch.setenv("COMPRESSM_BUILD_DIR", str(tmp_path / "builds"))
    monkeypatch.delenv("COMPRESSM_DISABLE_CPP", raising=False)
    monkeypatch.setattr(cpp, "_build", lambda *_: pytest.fail("doctor builds"))
    return tmp_path / "builds"


def test_the_command_prints_what_was_found(nothing_built):
    printed = run("doctor").output
    assert torch.__version__ in printed
    for heading in ("Found", "What runs where", "compiler", "triton", "extra [train]"):
        assert heading in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert not nothing_built.exists()
    told = json.loads(run("doctor", "--json").output)
    assert set(told) == {"found", "runs", "missing"}
    assert told["runs"].keys() >= {CPU, "GPU"}


@pytest.mark.skipif(cpp._compiler() is None, reason="no compiler")
def test_a_library_that_is_not_built_yet(nothing_built):
    found = doctor.diagnose()
    assert found.found["C++ kernels"] == f"not built yet, will lie in {nothing_built}"
    assert "--build" in found.runs[CPU]
    assert not found.missing or "C++" not in found.missing[0]
    (nothing_built / "compressm_cpp_0123").mkdir(parents=True)
    assert doctor.diagnose().found["older builds"].startswith("1 in ")


@pytest.mark.parametrize(
    ("lost", "words"),
    [("compiler", "no C++ compiler"), ("ninja", "ninja is not installed"), ("folder", "cannot be written to")],
)
def test_each_thing_that_is_missing_has_a_line(nothing_built, monkeypatch, lost, words):
    if lost == "compiler":
        monkeypatch.setattr(cpp_extension, "get_cxx_compiler", lambda: "/nonexistent/c++")
    elif lost == "ninja":
        monkeypatch.setattr(cpp, "_compiler", lambda: sys.executable)
        monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    else:
        monkeypatch.setattr(cpp, "_compiler", lambda: sys.executable)
        nothing_built.write_text("in the way")
    found = doctor.diagnose()
    assert len([line for line in found.missing if words in line]) == 1
    assert found.runs[CPU].startswith("plain torch")
    assert words in found.found["C++ kernels"]


def test_extras_and_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = doctor.diagnose()
    assert found.found["extra [train]"] == "without jinja2"
    assert any(line.startswith("jinja2: ") and "compressm[train]" in line for line in found.missing)
    assert any(line.startswith("triton: ") for line in found.missing)
    assert found.runs["GPU"].startswith("plain torch")
    assert set(doctor.NEEDED_FOR) == set(EXTRAS)


def test_what_runs_on_a_gpu_and_what_the_environment_says(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(doctor, "_version", lambda package: "3.5")
    monkeypatch.setenv("COMPRESSM_BACKEND", "reference")
    found = doctor.diagnose()
    named = set(re.findall(r"\w+", found.runs["GPU"]))
    assert set(OPS) <= named
    assert "up to 1024 key channels a head; else plain torch" in found.runs["GPU"]
    assert found.runs["COMPRESSM_BACKEND"].startswith("reference")


def test_kernels_that_an_installation_brings_are_found_before_others(nothing_built, monkeypatch, tmp_path):
    root = cpp._folder()
    package = tmp_path / "package"
    (package / "_prebuilt").mkdir(parents=True)
    (package / "_csrc").symlink_to(root)
    monkeypatch.setattr(cpp, "PACKAGE", package)
    monkeypatch.setattr(cpp, "_compiler", lambda: None)
    assert cpp.found().reason == "no C++ compiler found (neither $CXX nor c++ is one)"
    library = package / "_prebuilt" / cpp._prebuilt_name(package / "_csrc")
    library.touch()
    found = cpp.found()
    assert (found.library, found.prebuilt, found.reason) == (library, True, None)
    monkeypatch.setattr(torch, "__version__", "1.0")  # of another torch
    assert cpp.found().library is None
    assert cpp._load(library).startswith(f"loading {library} failed: ")


def test_without_the_extra_of_the_command(monkeypatch, capsys):
    from compressm.__main__ import main

    monkeypatch.setattr(sys, "argv", ["compressm", "doctor"])
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "compressm.cli", raising=False)
    main()
    printed = capsys.readouterr().out
    assert "typer" in printed.partition("Missing")[2]
    assert str(Path(sys.executable)) in printed.replace("\n", "").replace(" ", "")
