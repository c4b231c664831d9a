"""Every error a user of compressm can meet.

Each message says which argument or file is meant, what came, what was expected, and the way out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# What the extras install beyond the core, by the name under which it is imported.
EXTRAS = {
    "train": {
        "typer": "typer", "pydantic": "pydantic", "matplotlib": "matplotlib", "jinja2": "jinja2", "sklearn": "scikit-learn",
        "pooch": "pooch", "PIL": "pillow", "scipy": "scipy",
    },
    "integrations": {
        "transformers": "transformers", "accelerate": "accelerate", "lightning": "lightning",
        "pytorch_lightning": "lightning", "peft": "peft",
    },
}  # fmt: skip


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


class DependencyError(CompressmError, ImportError):
    """A package of an extra is missing, or cannot be used."""


def bad_argument(name: str, *, got: Any, expected: str, remedy: str = "") -> ArgumentError:
    """Build the error for one wrong argument; the caller raises it."""
    message = f"{name}: expected {expected}, got {got}"
    return ArgumentError(f"{message}. {remedy}" if remedy else message)


def check_integer(name: str, value: object, least: int = 1, most: float = math.inf, *, expected: str = "") -> None:
    """Raise ArgumentError unless an argument is an integer, and no bool, from ``least`` to ``most``.

    Args:
        expected: in words, in the place of those that follow from the limits.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        if not expected and most == math.inf:
            expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise bad_argument(name, got=repr(value), expected=expected or f"an integer from {least} to {most}")


def check_number(name: str, value: object, expected: str, allowed: Callable[[float], bool]) -> None:
    """Raise ArgumentError unless an argument is a number, and no bool, that is allowed."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not allowed(value):
        raise bad_argument(name, got=repr(value), expected=expected)


@contextmanager
def needs_extra(what: str) -> Iterator[None]:
    """Say which extra to install where something inside imports a package of one that is missing.

    Args:
        what: needs the package, for the message.

    Raises:
        DependencyError: a package of :data:`EXTRAS` is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        for extra, packages in EXTRAS.items():
            if module in packages:
                remedy = f"Install it with pip install 'compressm[{extra}]'"
                raise DependencyError(f"{what}: {packages[module]} is not installed. {remedy}") from error
        raise
