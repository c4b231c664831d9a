"""What ``compressm bench`` is asked for, checked as far as that goes before torch is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from compressm.errors import ConfigError
from compressm.experiments.registry import did_you_mean
from compressm.inputs import check_device

WORDS = {"channels": "d-model"}  # for sizes that users know by another name
OPTIONS = ("batch", "length", "channels", "states", "width", "blocks", "layers", "rank")  # sizes that are options by themselves
PASSES = ("forward", "forward+backward", "step")
DTYPES = ("float32", "bfloat16", "float16")
MOST_ROUNDS = 100_000


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

    def check(self, ops: Iterable[str]) -> None:
        """Refuse what no op can take.

        Args:
            ops: their names.

        Raises:
            ConfigError: an unknown name, or a number out of range.
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
        self.numbers_of_states()

    def numbers_of_states(self) -> list[int]:
        """Of ``states``, as numbers."""
        try:
            found = [] if self.states is None else [int(part) for part in self.states.split(",")]
        except ValueError:
            found = [0]
        if any(number < 1 for number in found):
            raise ConfigError(f"--states: got {self.states!r}, expected positive integers separated by commas, such as 128,12")
        return found


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
