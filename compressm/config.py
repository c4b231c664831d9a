"""The only reader of environment variables.

``COMPRESSM_BACKEND``
    Name of the kernel backend to use where a call does not name one: ``reference``, ``cpp`` or ``triton``.
``COMPRESSM_BUILD_DIR``
    Folder in which the C++ kernels are built and cached (default: torch's extension folder).
``COMPRESSM_CXXFLAGS``
    Further flags for the C++ compiler, behind those of the package; other flags are another build.
``COMPRESSM_DISABLE_CPP``
    ``1`` skips the C++ kernels; the plain torch forms run instead.

Where glibc's own variables tune its malloc, it is left as the user wants it.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from compressm.errors import ConfigError

BACKENDS = ("reference", "cpp", "triton")
MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


@dataclass(frozen=True)
class Config:
    """Settings read from the environment at the moment of the call."""

    backend: str | None
    build_dir: Path | None
    cpp_enabled: bool
    cxx_flags: tuple[str, ...] = ()


def current() -> Config:
    """Read the environment; raises ConfigError on a value that is not allowed."""
    disable = os.environ.get("COMPRESSM_DISABLE_CPP", "0")
    if disable not in ("0", "1", ""):
        raise ConfigError(f"COMPRESSM_DISABLE_CPP: expected 0 or 1, got {disable!r}")
    folder = os.environ.get("COMPRESSM_BUILD_DIR")
    try:
        flags = tuple(shlex.split(os.environ.get("COMPRESSM_CXXFLAGS", "")))
    except ValueError as error:
        raise ConfigError(f"COMPRESSM_CXXFLAGS: expected flags as a shell takes them ({error})") from error
    return Config(backend(), Path(folder) if folder else None, disable != "1", flags)


def backend() -> str | None:
    """``current().backend`` alone, which every call of an op looks up."""
    name = os.environ.get("COMPRESSM_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ConfigError(f"COMPRESSM_BACKEND: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def tunes_malloc() -> bool:
    """Whether the user sets how glibc's malloc keeps and gives back memory, see mallopt(3)."""
    return "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "") or any(name in os.environ for name in MALLOC_VARIABLES)
