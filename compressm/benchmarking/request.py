"""What ``compressm bench`` is asked for, checked as far as that goes before torch is loaded."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from compressm.errors import ConfigError
from compressm.experiments.registry import did_you_mean
from compressm.inputs import check_device

WORDS = {"channels": "d-model"}  # for sizes that users know by another name
OPTIONS = ("batch", "length", "channels", "states", "width", "blocks", "layers", "rank")  # sizes that are options by themselves
PASSES = ("forward", "forward+backward", "step")
DTYPES = ("float32", "bfloat16", "float16")
MOST_ROUNDS = 100_000
STACK = {"layers": 6, "channels": 512, "states": 384}  # of LRU layers
SIZES = {  # of what is measured beside the ops: names and defaults
    "lru": {"batch": 16, "length": 1024, "channels": 512, "states": 384},
    "mamba": {"batch": 16, "length": 256, "channels": 64, "states": 128},
    "s5": {"batch": 16, "length": 1024, "channels": 256, "states": 384},
    "s4d": {"batch": 16, "length": 1024, "channels": 256, "states": 32},
    "loop": {"channels": 4, "states": 16},
    "smnist": {"batch": 50, "channels": 8, "states": 256, "blocks": 1},
    "scifar": {"batch": 16, "channels": 512, "states": 384, "blocks": 1},
    "mamba-lm": {"batch": 16, "channels": 64, "length": 256, "states": 128, "blocks": 2},
    "balanced_truncation": {"channels": 8, "states": 256, "rank": 28},
    "attempt": STACK,
    "attempt-s5": {"layers": 6, "channels": 256, "states": 384},
    "rollback": STACK,
    "waiting": STACK,
}


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        op: key of ``cases.OPS``.
        sizes: those that were given, by name, without the states.
        states: one or more numbers of states, separated by commas; None takes the op's default.
        passes: ``"forward"``, ``"forward+backward"`` or ``"step"``; None takes the op's last.
        dtype, device: of the inputs.
        rounds: of every contender; None decides by time.
        compile: also time torch.compile, which takes minutes to compile.
    """

    op: str
    sizes: Mapping[str, int]
    states: str | None = None
    passes: str | None = None
    dtype: str | None = None
    device: str = "cpu"
    rounds: int | None = None
    compile: bool = False

    def check(self, ops: Mapping[str, Mapping[str, int]]) -> None:
        """Refuse what no op can take, and sizes that this one has not.

        Args:
            ops: names and defaults of their sizes by the names of the ops.

        Raises:
            ConfigError: an unknown name, a number out of range, or a size without meaning for the op.
        """
        known = list(ops)
        if self.op not in known:
            raise ConfigError(f"op: got {self.op!r}{did_you_mean(self.op, known)}, expected one of {', '.join(known)}")
        for name, size in self.sizes.items():
            if size < 1:
                raise ConfigError(f"{flag(name)}: got {size}, expected a positive integer")
        if self.passes not in (None, *PASSES):
            raise ConfigError(f"pass: got {self.passes!r}, expected one of {', '.join(PASSES)}")
        if self.dtype not in (None, *DTYPES):
            raise ConfigError(f"dtype: got {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.rounds is not None and not 1 <= self.rounds <= MOST_ROUNDS:
            raise ConfigError(f"--rounds: got {self.rounds}, expected 1 to {MOST_ROUNDS}")
        check_device(self.device)
        self._check_sizes(ops[self.op])

    def _check_sizes(self, defaults: Mapping[str, int]) -> None:
        found = self.numbers_of_states()
        for name in self.sizes:
            if name not in defaults:
                allowed = ", ".join(flag(other) for other in defaults)
                raise ConfigError(f"{flag(name)}: has no meaning for {self.op}, expected {allowed}")
        if found and "states" not in defaults:
            raise ConfigError(f"--states: has no meaning for {self.op}, which keeps no states")
        if found and "rank" in defaults and min(found) < {**defaults, **self.sizes}["rank"]:
            raise ConfigError(f"--states: got {min(found)}, expected at least the rank that is kept. Give a smaller --rank")

    def numbers_of_states(self) -> list[int]:
        """Of ``states``, as numbers."""
        try:
            found = [] if self.states is None else [int(part) for part in self.states.split(",")]
        except ValueError:
            found = [0]
        if any(number < 1 for number in found):
            raise ConfigError(f"--states: got {self.states!r}, expected positive integers separated by commas, such as 128,12")
        return found


def names_of_ops(folder: Path) -> list[str]:
    """Of all ops, which are the folders in that of the kernels that export records; these are not read."""
    return sorted(path.parent.name for path in folder.glob("*/__init__.py") if "OPS" in path.read_text(encoding="utf-8"))


def sizes_of_ops(folder: Path) -> dict[str, dict[str, int]]:
    """Names and defaults of all ops' sizes, by the ops' names, read off the sources of their records.

    Args:
        folder: of the kernels; those folders in it that export records are ops.
    """
    files = (path for name in ("__init__.py", "record.py") for path in folder.glob(f"*/{name}"))
    return dict(sorted(found for path in files for found in _records(path)))


def _records(path: Path) -> Iterator[tuple[str, dict[str, int]]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Op":
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            yield ast.literal_eval(given["name"]), ast.literal_eval(given["sizes"])


def other_sizes(assignments: list[str]) -> dict[str, int]:
    """Sizes by name of ``NAME=NUMBER`` each."""
    sizes = {}
    for assignment in assignments:
        name, _, number = assignment.partition("=")
        if not number.isdigit():
            raise ConfigError(f"--size: got {assignment!r}, expected NAME=NUMBER, such as length=1024")
        sizes[name] = int(number)
    return sizes


def flag(name: str) -> str:
    return f"--{word(name)}" if name in OPTIONS else f"--size {name}="


def word(name: str) -> str:
    return WORDS.get(name, name)
