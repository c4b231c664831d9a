"""Whether data from a file have the types that a program expects."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

LARGEST = 2**63


def fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is what the type says; lists count as tuples, ints as floats, and bools never as numbers.

    Args:
        value: a tree of JSON values.
        hint: None, bool, int (of 64 bits), float, str, a class, or one of list, tuple (of one kind of item), dict and
            unions of these.
    """
    if hint is Any:
        return True
    if hint in (None, NoneType):
        return value is None
    if hint in (int, float):
        if isinstance(value, bool) or not isinstance(value, int if hint is int else int | float):
            return False
        return isinstance(value, float) or -LARGEST <= value < LARGEST
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if kind in (list, tuple):
        return isinstance(value, list | tuple) and all(fits(item, parts[0]) for item in value)
    if kind is dict:
        return isinstance(value, Mapping) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    return isinstance(value, kind or hint)


def is_number(value: object) -> bool:
    """Whether it is an int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)
