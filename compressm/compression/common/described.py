"""What a value is, in words that are the same in every process that holds an equal one."""

from __future__ import annotations

import enum
import functools
import re
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from compressm.adapters.registry import qualified_name

ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+")


def described(value: Any) -> Any:
    """A JSON tree: containers, dataclasses, functions and tensors (dtype and shape) taken apart, of other objects their repr.

    An object without a ``__repr__`` of its own is described by its class alone, and addresses in a repr are left out.
    """
    if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, enum.Enum)):
        return value
    name = qualified_name(type(value))
    if isinstance(value, Tensor):
        return [name, str(value.dtype), list(value.shape)]
    if isinstance(value, Mapping):
        return [name, sorted(([described(key), described(item)] for key, item in value.items()), key=repr)]
    if isinstance(value, list | tuple):
        return [name, [described(item) for item in value]]
    if isinstance(value, set | frozenset):
        return [name, sorted((described(item) for item in value), key=repr)]
    if is_dataclass(value) and not isinstance(value, type):
        return [name, [[f.name, described(getattr(value, f.name, None))] for f in fields(value) if f.repr]]
    if isinstance(value, functools.partial):
        return [name, described(value.func), described(value.args), described(value.keywords)]
    if isinstance(value, types.MethodType):
        return [name, value.__func__.__qualname__, described(value.__self__)]
    if isinstance(value, type | types.FunctionType):
        return [name, f"{value.__module__}.{value.__qualname__}"]
    return [name, None if type(value).__repr__ is object.__repr__ else ADDRESS.sub("", repr(value))]
