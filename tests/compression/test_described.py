"""Processes compare what they hold by a description that is the same wherever the values are."""

from __future__ import annotations

import enum
import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import compressm
from compressm.compression.common.described import described
from compressm.errors import ArgumentError


class Plain:
    """No repr of its own."""

    def method(self):
        """Nothing."""


class Holder:
    """A repr of its own, with an address in it."""

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"Holder({self.inner!r})"


class Pair(NamedTuple):
    left: Any
    right: Any


class Colour(enum.Enum):
    RED = 1


@dataclass(frozen=True)
class Mine(compressm.FixedRank):
    """A policy with functions, objects and a cache."""

    hook: Any = None
    cache: Any = field(default=None, repr=False)


def values():
    names = {"alpha", "beta", "gamma", "delta"}
    return {
        "plain": Plain(),
        "holder": Holder(Plain()),
        "list": [Plain(), (Plain(), names)],
        "mapping": {name: Plain() for name in names},
        "frozen": frozenset(names),
        "pair": Pair(Plain(), None),
        "function": lambda x: x,
        "named function": values,
        "method": Plain().method,
        "partial": functools.partial(values, Plain(), a=names),
        "class": Plain,
        "enum": Colour.RED,
        "generator": torch.Generator(),
        "tensor": torch.randn(3),
        "policy": Mine(3, hook=lambda: None, cache=id(names)),
        "numbers": [1, 1.5, True, None, 2j, float("nan"), b"x"],
        "module": torch.nn.Linear(2, 3),
    }


def test_the_same_in_two_processes():
    script = "import json; from compression.test_described import *; print(json.dumps(described(values()), sort_keys=True))"
    root = Path(compressm.__file__).parent.parent
    said = []
    for seed, padding in (("1", ""), ("2", "x = [object() for _ in range(12345)]; ")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
        command = [sys.executable, "-c", padding + script]
        said.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert json.dumps(json.loads(said[0])) == json.dumps(json.loads(said[1]))
    assert "0x" not in said[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        ("a", "b"),
        ([1, 2], (1, 2)),
        ([1, 2], [2, 1]),
        ({"a": 1}, {"a": 2}),
        ({1, 2}, {1, 3}),
        (Plain(), Holder(1)),
        (Holder(1), Holder(2)),
        (Mine(3), Mine(4)),
        (Mine(3, hook=values), Mine(3, hook=described)),
        (compressm.FixedRank(3), Mine(3)),
        (functools.partial(values, 1), functools.partial(values, 2)),
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2).double()),
        (torch.float32, torch.float64),
        (ArgumentError, ValueError),
    ],
)
def test_what_differs_is_described_differently(one, other):
    assert json.dumps(described(one)) != json.dumps(described(other))
    assert json.dumps(described(one)) == json.dumps(described(one))
