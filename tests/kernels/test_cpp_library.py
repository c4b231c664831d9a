"""Where the C++ library lies: a folder that cannot be written to is a warning and the reference, or no matter at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from compressm.kernels.core import cpp

LINKED = 'extern "C" int compressm_linked() { return 3; }'
CALL = """
import warnings
import torch
from compressm import kernels
from compressm.kernels.fused_cpu import layer_norm
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    x = torch.randn(2, 8, 9)
    y = kernels.causal_conv1d(x, torch.ones(8, 2))
    layer_norm(x, torch.ones(9))
print(float((y[..., 1:] - x[..., 1:] - x[..., :-1]).abs().max()) < 1e-5)
print([str(w.message) for w in told if "compressm" in str(w.message)])
"""


def run(folder: Path) -> tuple[str, list[str]]:
    """Whether the result is right, and the warnings, of a process with that folder for the library."""
    environment = {**os.environ, "COMPRESSM_BUILD_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", CALL], env=environment, capture_output=True, text=True, check=True)
    right, told = done.stdout.splitlines()
    return right, eval(told)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_means_the_reference_and_one_warning(tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    right, told = run(tmp_path / place)
    assert right == "True"
    assert len(told) == 1
    assert "COMPRESSM_BUILD_DIR" in told[0]
    assert "Plain torch runs instead" in told[0]


def test_a_library_that_is_there_is_loaded_without_writing(tmp_path):
    if cpp.why_not() is not None:
        pytest.skip("no C++ library here")
    digest = cpp._digest(cpp._folder(), cpp._version(cpp._compiler()))
    built = cpp._build_folder(digest) / f"compressm_cpp_{digest}.so"
    folder = tmp_path / built.parent.name
    folder.mkdir()
    shutil.copy(built, folder)
    folder.chmod(0o555)
    assert run(tmp_path) == ("True", [])
    assert [path.name for path in folder.iterdir()] == [built.name]


@pytest.mark.skipif(cpp._compiler() is None, reason="no compiler")
def test_sources_libraries_and_torch_may_lie_in_folders_with_spaces(tmp_path, monkeypatch):
    sources, builds, torchs = (tmp_path / name for name in ("the sources", "the builds", "torch's own"))
    for folder in (sources, builds):
        folder.mkdir()
    (sources / "linked.cpp").write_text(LINKED)
    torchs.symlink_to(cpp_extension.TORCH_LIB_PATH)
    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", str(torchs))
    library = builds / "linked_in_spaces.so"
    cpp._build(sources, library, ["-std=c++20"])
    assert ctypes.CDLL(str(library)).compressm_linked() == 3
    assert cpp_extension.TORCH_LIB_PATH == str(torchs)
