"""Every error a user of compressm can meet.

Each message says which argument or file is meant, what came, what was expected, and the way out.
"""

from __future__ import annotations

from typing import Any


class CompressmError(Exception):
    """Base class of all errors raised by compressm."""


class ArgumentError(CompressmError, ValueError):
    """An argument has the wrong shape, dtype, range or type."""


class BackendError(CompressmError, RuntimeError):
    """A kernel backend that was asked for cannot run this call."""


class ModelError(CompressmError, RuntimeError):
    """The model cannot be compressed as it is (unknown layer, wrapped model, non-finite parameters)."""


class OptimizerError(CompressmError, RuntimeError):
    """The optimizer does not fit the model, or its state cannot be transported."""


class NumericalError(CompressmError, ArithmeticError):
    """A computation has no finite answer (NaN or infinite parameters, unstable system)."""


class DistributedError(CompressmError, RuntimeError):
    """Processes that train one model together disagree, or one of them failed."""


class DataError(CompressmError, RuntimeError):
    """A dataset is missing, incomplete or damaged."""


class CheckpointError(CompressmError, RuntimeError):
    """A checkpoint cannot be written or read."""


class ConfigError(CompressmError, ValueError):
    """A preset, key or value of the command line is unknown or out of range."""


def bad_argument(name: str, *, got: Any, expected: str, remedy: str = "") -> ArgumentError:
    """Build the error for one wrong argument; the caller raises it."""
    message = f"{name}: expected {expected}, got {got}"
    return ArgumentError(f"{message}. {remedy}" if remedy else message)
