"""compressm: state-space models that grow smaller and faster while they train.

An independent PyTorch implementation of in-training balanced truncation (CompreSSM: Chahine, Nazari, Rus, Rusch,
ICLR 2026, arXiv 2510.02823), with its own kernels.  Importing it touches no GPU, compiler or environment; each name below
is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from compressm._version import __version__

_EXPORTS = {
    "DiagonalSystem": "compressm.control",
    "balance": "compressm.control",
    "Compressor": "compressm.compression",
    "Energy": "compressm.compression",
    "FixedRank": "compressm.compression",
    "Shrink": "compressm.compression",
    "Budget": "compressm.compression",
    "Largest": "compressm.compression",
    "ErrorBound": "compressm.compression",
    "Once": "compressm.compression",
    "Warmup": "compressm.compression",
    "Every": "compressm.compression",
    "At": "compressm.compression",
    "WhenStable": "compressm.compression",
    "Watch": "compressm.compression",
    "Rollback": "compressm.compression",
    "compress": "compressm.compression",
    "inspect": "compressm.compression",
    "save": "compressm.compression",
    "load": "compressm.compression",
    "save_sharded": "compressm.compression.saving.sharded",
    "load_sharded": "compressm.compression.saving.sharded",
    "resize_to": "compressm.integrations.resizing",
    "register_adapter": "compressm.adapters",
    "citation": "compressm.references",
    "CompressmError": "compressm.errors",
}
_SUBMODULES = ("adapters", "compression", "control", "errors", "kernels", "layers")

__all__ = [*_EXPORTS, *_SUBMODULES]

if TYPE_CHECKING:
    from compressm import adapters, compression, control, errors, kernels, layers
    from compressm.adapters import register_adapter
    from compressm.compression import (
        At,
        Budget,
        Compressor,
        Energy,
        ErrorBound,
        Every,
        FixedRank,
        Largest,
        Once,
        Rollback,
        Shrink,
        Warmup,
        Watch,
        WhenStable,
        compress,
        inspect,
        load,
        save,
    )
    from compressm.compression.saving.sharded import load_sharded, save_sharded
    from compressm.control import DiagonalSystem, balance
    from compressm.errors import CompressmError
    from compressm.integrations.resizing import resize_to
    from compressm.references import citation


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"compressm.{name}")
    raise AttributeError(f"module 'compressm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
