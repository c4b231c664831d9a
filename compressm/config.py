"""The only reader of environment variables.

``COMPRESSM_BACKEND``
    Name of the kernel backend to use where a call does not name one: ``reference``, ``cpp`` or ``triton``.
``COMPRESSM_BUILD_DIR``
    Folder in which the C++ kernels are built and cached (default: torch's extension folder).
``COMPRESSM_DISABLE_CPP``
    ``1`` skips the C++ kernels; the plain torch forms run instead.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from compressm.errors import ConfigError

BACKENDS = ("reference", "cpp", "triton")


@dataclass(frozen=True)
class Config:
    """Settings read from the environment at the moment of the call."""

    backend: str | None
    build_dir: Path | None
    cpp_enabled: bool


def current() -> Config:
    """Read the environment; raises ConfigError on a value that is not allowed."""
    disable = os.environ.get("COMPRESSM_DISABLE_CPP", "0")
    if disable not in ("0", "1", ""):
        raise ConfigError(f"COMPRESSM_DISABLE_CPP: expected 0 or 1, got {disable!r}")
    folder = os.environ.get("COMPRESSM_BUILD_DIR")
    return Config(backend(), Path(folder) if folder else None, disable != "1")


def backend() -> str | None:
    """``current().backend`` alone, which every call of an op looks up."""
    name = os.environ.get("COMPRESSM_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ConfigError(f"COMPRESSM_BACKEND: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name
