"""Builds and loads the C++ kernels of ``csrc/``, once.

The first call compiles them with ninja into torch's extension cache (or ``COMPRESSM_BUILD_DIR``); later processes load
the cached library.  The folder's name carries a digest of the sources, torch's version and the compiler, so that changing any
of them builds anew and never loads a stale library.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from compressm import config
from compressm.errors import BackendError

logger = logging.getLogger("compressm")

# torch's header of every operator takes longer to read than all else to compile.
_FLAGS = ("-O3", "-std=c++20", "-fno-math-errno", "-Wall", "-DAT_PER_OPERATOR_HEADERS")


def _folder() -> Path | None:
    """Where the sources are; None where this installation has none."""
    package = Path(__file__).resolve().parents[2]
    return next(filter(Path.is_dir, (package / "_csrc", package.parent / "csrc")), None)


def _sources(folder: Path) -> list[Path]:
    """All files of all rooms; no two may have one name, as their objects lie in one folder."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".cpp", ".h", ".inc"))


def _compiler() -> str | None:
    from torch.utils import cpp_extension

    return shutil.which(cpp_extension.get_cxx_compiler())


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def parallel() -> bool:
    """Whether the kernels are built to run on torch's threads."""
    compiler = _compiler()
    return compiler is not None and "-fopenmp" in _flags(_version(compiler))


def _flags(version: str) -> list[str]:
    """Compiler flags; at::parallel_for needs OpenMP, or it runs on one thread.

    GCC's calls are answered by the OpenMP library that torch itself has loaded; clang would bring a second one.
    """
    openmp = torch.backends.openmp.is_available() and "clang" not in version.lower()
    return [*_FLAGS, *(["-fopenmp"] if openmp else [])]


def _digest(root: Path, version: str) -> str:
    digest = hashlib.sha256(f"{torch.__version__} {sys.version} {version} {_flags(version)}".encode())
    for path in _sources(root):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _build_folder(digest: str) -> Path:
    from torch.utils import cpp_extension

    root = config.current().build_dir or Path(cpp_extension.get_default_build_root())
    return root / f"compressm_cpp_{digest}"


@functools.cache
def why_not() -> str | None:
    """None if the C++ kernels are loaded (building them if needed), else the reason; warns once when they are lost."""
    if not config.current().cpp_enabled:
        return "switched off by COMPRESSM_DISABLE_CPP=1"
    root = _folder()
    if root is None:
        return "the C++ sources (csrc/) are not part of this installation"
    compiler = _compiler()
    missing = "no C++ compiler found (neither $CXX nor c++ is one)"
    reason = missing if compiler is None else _load(root, compiler)
    if reason is not None:
        warnings.warn(
            f"compressm: the C++ CPU kernels are not available: {reason}. Plain torch runs instead, several times slower. "
            "Install a C++20 compiler and ninja, name a folder that can be written to by COMPRESSM_BUILD_DIR, or set "
            "COMPRESSM_DISABLE_CPP=1 to silence this.",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason


def why_not_for(device: str, dtype: torch.dtype) -> str | None:
    """None if the C++ kernels run for tensors of this device type and dtype, else the reason."""
    if device != "cpu":
        return f"the C++ kernels run on CPU tensors, not on {device}"
    if dtype == torch.float64:
        return "the C++ kernels compute in float32; float64 runs on the reference"
    return why_not()


class _Library:
    """The ops of ``torch.ops.compressm_cpp``, found once: a call by the overload skips the choice of one."""

    def __getattr__(self, name: str) -> Any:
        op = getattr(torch.ops.compressm_cpp, name).default
        setattr(self, name, op)
        return op


@functools.cache
def library() -> Any:
    """The loaded ops by their names; BackendError with the reason where there are none."""
    reason = why_not()
    if reason is not None:
        raise BackendError(f"the C++ kernels cannot run: {reason}")
    return _Library()


def _load(root: Path, compiler: str) -> str | None:
    """Load the library, building it first where there is none; the reason where that fails."""
    from filelock import FileLock

    version = _version(compiler)
    digest = _digest(root, version)
    folder = _build_folder(digest)
    library = folder / f"compressm_cpp_{digest}.so"
    try:
        if not library.exists():  # a library that is there is complete, and its folder need not be writable
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "build.lock"):  # the system frees it when its holder dies
                if not library.exists():
                    _build(root, library, _flags(version))
                    return None
        torch.ops.load_library(str(library))
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return f"building or loading them in {folder} failed: {(str(error).strip() or repr(error)).splitlines()[-1]}"
    return None


def _build(root: Path, library: Path, flags: list[str]) -> None:
    """Compile and load; a library that is there is complete, even if an earlier build was killed half-way."""
    from torch.utils import cpp_extension

    started = time.perf_counter()
    logger.warning("compressm: building the C++ kernels once (a minute or two) in %s", library.parent)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        cpp_extension.load(
            name=library.stem,
            sources=[str(path) for path in _sources(root) if path.suffix == ".cpp"],
            extra_cflags=flags,
            extra_include_paths=[str(root)],
            build_directory=folder,
            is_python_module=False,
            verbose=False,
        )
        os.replace(Path(folder) / library.name, library)
    logger.warning("compressm: built in %.0f s", time.perf_counter() - started)
