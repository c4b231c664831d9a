"""Builds and loads the C++ kernels of ``csrc/``, once.

An installation that was made with ``COMPRESSM_PREBUILD=1`` brings the library for its platform and torch.  Elsewhere the first
call compiles it with ninja into torch's extension cache (or ``COMPRESSM_BUILD_DIR``); later processes load the cached library.
Names carry a digest of the sources, torch's version and the compiler, so that changing any of them builds anew and never loads
a stale library.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressm import config
from compressm.errors import BackendError

logger = logging.getLogger("compressm")

# torch's header of every operator takes longer to read than all else to compile.
_FLAGS = ("-O3", "-std=c++20", "-fno-math-errno", "-Wall", "-DAT_PER_OPERATOR_HEADERS")
_NAME = "compressm_cpp_"
_TORCH_HEADER = Path("core", "torch.h")
PACKAGE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Found:
    """What there is of the C++ kernels, without building or loading any.

    Attributes:
        library: the compiled library that the first call loads; None: there is none yet.
        prebuilt: whether the installation brought it.
        compiler: path of the C++ compiler; None: there is none.
        version: the first line of what the compiler says of itself.
        builds: folder in which libraries are built.
        others: what lies there for other sources, another torch or another compiler.
        reason: why the first call can neither load nor build it; None: it can, as far as can be told.
    """

    library: Path | None
    prebuilt: bool
    compiler: str | None
    version: str
    builds: Path
    others: tuple[Path, ...]
    reason: str | None


def found() -> Found:
    """What the first call would find; builds and loads nothing."""
    root, compiler, builds = _folder(), _compiler(), _build_root()
    version = _version(compiler) if compiler else ""
    own = _build_folder(_digest(root, version)) if root and compiler else None
    brought = _prebuilt(root) if root else None
    built = own / f"{own.name}.so" if own else None
    library = brought or (built if built and built.exists() else None)
    others = tuple(path for path in sorted(builds.glob(f"{_NAME}*")) if path != own)
    reason = None if library else _cannot_build(root, compiler, builds)
    line = (version.splitlines() or [""])[0]
    return Found(library, brought is not None, compiler, line, builds, others, _switched_off() or reason)


def _switched_off() -> str | None:
    return None if config.current().cpp_enabled else "switched off by COMPRESSM_DISABLE_CPP=1"


def _cannot_build(root: Path | None, compiler: str | None, builds: Path) -> str | None:
    """Why no library can be built; None: nothing is known to be in the way."""
    from torch.utils import cpp_extension

    if root is None:
        return "the C++ sources (csrc/) are not part of this installation"
    if compiler is None:
        return "no C++ compiler found (neither $CXX nor c++ is one)"
    if not cpp_extension.is_ninja_available():
        return "ninja is not installed"
    there = next(folder for folder in (builds, *builds.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return f"the folder {builds} cannot be written to"
    return None


def _folder() -> Path | None:
    """Where the sources are; None where this installation has none."""
    return next(filter(Path.is_dir, (PACKAGE / "_csrc", PACKAGE.parent / "csrc")), None)


def _prebuilt(root: Path) -> Path | None:
    """The library that the installation brought for these sources, this platform and torch; None: it brought none."""
    folder = PACKAGE / "_prebuilt"
    path = folder / _prebuilt_name(root) if folder.is_dir() else None
    return path if path is not None and path.exists() else None


def _prebuilt_name(root: Path) -> str:
    """Any Python loads it: its ops are known to torch alone."""
    return f"{_NAME}{_digest_of(root, f'{torch.__version__} {sysconfig.get_platform()}')}.so"
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
    return [*_FLAGS, *(["-fopenmp"] if openmp else []), *config.current().cxx_flags]


def _digest(root: Path, version: str) -> str:
    return _digest_of(root, f"{torch.__version__} {sys.version} {version} {_flags(version)}")


def _digest_of(root: Path, facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for path in _sources(root):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _build_root() -> Path:
    from torch.utils import cpp_extension

    return config.current().build_dir or Path(cpp_extension.get_default_build_root())


def _build_folder(digest: str) -> Path:
    return _build_root() / f"{_NAME}{digest}"


@functools.cache
def why_not() -> str | None:
    """None if the C++ kernels are loaded (building them if needed), else the reason; warns once when they are lost."""
    if (off := _switched_off()) is not None:
        return off
    root, compiler = _folder(), _compiler()
    if root is None:
        return _cannot_build(root, compiler, _build_root())
    if (library := _prebuilt(root)) is not None:
        reason = _load(library)
    elif compiler is None:
        reason = _cannot_build(root, compiler, _build_root())
    else:
        reason = _load_or_build(root, compiler)
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


def _load(library: Path) -> str | None:
    """Load a library; the reason where that fails."""
    try:
        torch.ops.load_library(str(library))
    except (RuntimeError, OSError) as error:
        return f"loading {library} failed: {_last_line(error)}"
    return None


def _load_or_build(root: Path, compiler: str) -> str | None:
    """Load the library, building it first where there is none; the reason where that fails."""
    from filelock import FileLock

    version = _version(compiler)
    digest = _digest(root, version)
    folder = _build_folder(digest)
    library = folder / f"{_NAME}{digest}.so"
    try:
        if not library.exists():  # a library that is there is complete, and its folder need not be writable
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "build.lock"):  # the system frees it when its holder dies
                if not library.exists():
                    _build(root, library, _flags(version))
                    return None
        torch.ops.load_library(str(library))
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return f"building or loading them in {folder} failed: {_last_line(error)}"
    return None


def _last_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[-1]


def prebuild(folder: Path) -> Path:
    """Compile the library that an installation brings, for this platform and torch, into a folder; returns its path.

    Raises:
        BackendError: there is no compiler, or there are no sources.
        RuntimeError: the compiler failed; says how.
    """
    root, compiler = _folder(), _compiler()
    if root is None or compiler is None:
        raise BackendError(f"COMPRESSM_PREBUILD: {_cannot_build(root, compiler, folder)}")
    library = folder / _prebuilt_name(root)
    _build(root, library, _flags(_version(compiler)))
    return library


@contextmanager
def _quoted_torch() -> Iterator[None]:
    """torch writes the folder of its libraries into the linker's command as it is, where a space would end it."""
    from torch.utils import cpp_extension

    before = cpp_extension.TORCH_LIB_PATH
    cpp_extension.TORCH_LIB_PATH = shlex.quote(before)
    try:
        yield
    finally:
        cpp_extension.TORCH_LIB_PATH = before


def _precompile(root: Path, folder: Path, flags: list[str]) -> None:
    """Compile torch's headers once instead of once a file: GCC takes ``core/torch.h.gch`` where it finds it on the way to
    ``core/torch.h``.  A build without it is as good, only twice as long.
    """
    from torch.utils import cpp_extension

    compiler = _compiler()
    if compiler is None or "clang" in _version(compiler).lower():
        return
    precompiled = folder / _TORCH_HEADER.with_suffix(".h.gch")
    precompiled.parent.mkdir()
    includes = [part for path in cpp_extension.include_paths() for part in ("-isystem", path)]
    command = [compiler, "-x", "c++-header", str(root / _TORCH_HEADER), "-o", str(precompiled), "-fPIC", *includes, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        logger.info("compressm: torch's headers are compiled anew for every file: %s", done.stderr)


def _build(root: Path, library: Path, flags: list[str]) -> None:
    """Compile and load; a library that is there is complete, even if an earlier build was killed half-way."""
    from torch.utils import cpp_extension

    started = time.perf_counter()
    logger.warning("compressm: building the C++ kernels once (one to three minutes on two cores) in %s", library.parent)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder, _quoted_torch():
        _precompile(root, Path(folder), flags)
        cpp_extension.load(
            name=library.stem,
            sources=[str(path) for path in _sources(root) if path.suffix == ".cpp"],
            extra_cflags=flags,
            extra_include_paths=[folder, str(root)],
            build_directory=folder,
            is_python_module=False,
            verbose=False,
        )
        os.replace(Path(folder) / library.name, library)
    logger.warning("compressm: built in %.0f s", time.perf_counter() - started)
