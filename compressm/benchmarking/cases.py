"""The one registry of what is measured: ops, layers, training steps and reductions at the sizes that matter.

Cases that only differ in their states (or lie on one scaling curve) form a family and are timed in the same rounds, so that
ratios between sizes are as fair as ratios between contenders.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from compressm.benchmarking import guard_problems, layer_problems, lti_problems, op_problems, reduction_problems, step_problems
from compressm.benchmarking.problems import Op, Problem
from compressm.benchmarking.results import Level, Pass
from compressm.errors import ConfigError, check_integer
from compressm.kernels import OPS as RECORDS
from compressm.kernels.core.op import Measured

_PROBLEMS = (op_problems, layer_problems, lti_problems, step_problems, reduction_problems, guard_problems)
OPS: dict[str, Op] = {name: op for module in _PROBLEMS for name, op in module.OPS.items()}
LETTERS = {"batch": "B", "channels": "D", "length": "L", "states": "N", "width": "W", "rank": "R"}  # others: the name itself
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INPUT_DTYPES = ("float32", "bfloat16", "float16")
DTYPES_OF_LEVEL = {"op": INPUT_DTYPES, "layer": INPUT_DTYPES, "step": ("float32", "bfloat16")}  # of a step: of its products
SEED = 0


@dataclass(frozen=True)
class Case:
    """One computation at one size.

    Attributes:
        op: key of OPS.
        sizes: (name, number) pairs.
        passes: what is computed.
        dtype: name of the inputs' dtype.
        device: where.
    """

    op: str
    sizes: tuple[tuple[str, int], ...]
    passes: Pass
    dtype: str
    device: str = "cpu"

    @property
    def level(self) -> Level:
        """What kind of thing the op is: op, layer, step or reduction."""
        return OPS[self.op].level

    @property
    def shape(self) -> dict[str, int]:
        """Sizes by name."""
        return dict(self.sizes)

    @property
    def group(self) -> str:
        """Name of what all contenders of this case compute, e.g. ``"selective_scan B2 D512 L1024 N128 forward"``."""
        words = [self.op, *(f"{LETTERS.get(name, name)}{size}" for name, size in self.sizes)]
        words += [] if self.passes == "step" else [self.passes]
        return " ".join([*words, *([] if self.dtype == OPS[self.op].dtype else [self.dtype])])

    def build(self) -> Problem:
        """The problem, with the same random numbers every time."""
        torch.manual_seed(SEED)
        return OPS[self.op].build(self.shape, self.passes, DTYPES[self.dtype], torch.device(self.device))


@dataclass(frozen=True)
class Family:
    """Cases that are timed in the same rounds.

    Attributes:
        name: for progress.
        cases: of one op.
        only: names of the contenders; None for all there are.
    """

    name: str
    cases: tuple[Case, ...]
    only: tuple[str, ...] | None = None


def case(op: str, sizes: Mapping[str, int], passes: str, dtype: str | None = None, device: str = "cpu") -> Case:
    """A checked case; without a dtype the op's own.

    Raises:
        ConfigError: unknown op, pass or dtype, or sizes that the op does not have or that are missing or not positive.
    """
    if op not in OPS:
        raise ConfigError(f"op: got {op!r}, expected one of {', '.join(OPS)}")
    allowed = OPS[op]
    chosen = next((known for known in allowed.passes if known == passes), None)
    if chosen is None:
        raise ConfigError(f"pass: got {passes!r}, expected one of {', '.join(allowed.passes)} for {op}")
    dtype = dtype or allowed.dtype
    possible = DTYPES_OF_LEVEL.get(allowed.level, ()) if allowed.dtype == "float32" else ()
    possible = possible or (allowed.dtype,)
    if dtype not in possible:
        raise ConfigError(f"dtype: got {dtype!r}, expected one of {', '.join(possible)} for {op}")
    if set(sizes) != set(allowed.sizes):
        raise ConfigError(f"sizes: got {', '.join(sizes)}, expected {', '.join(allowed.sizes)} for {op}")
    for name, size in sizes.items():
        check_integer(name, size)
    return Case(op, tuple((name, sizes[name]) for name in allowed.sizes), chosen, dtype, device)


def registry(device: str) -> list[Family]:
    """Everything that ``make bench`` (``"cpu"``) or ``make bench-gpu`` (``"cuda"``) measures."""
    gpu = torch.device(device).type == "cuda"
    families = [*_ops(gpu, device), *_layers(gpu, device), *_steps(gpu, device), *_reductions(gpu, device)]
    return [*families, *_curves(gpu, device)]


def _family(
    op: str, passes: str, device: str, states: Iterable[int], sizes: Mapping[str, int], dtype: str | None = None
) -> Family:
    cases = tuple(case(op, {**sizes, "states": n}, passes, dtype, device) for n in states)
    numbers = " ".join(f"{LETTERS.get(name, name)}{size}" for name, size in sizes.items())
    words = [op, numbers, *([] if passes == "step" else [passes]), *([] if dtype is None else [dtype])]
    return Family(" ".join(words), cases)


def _ops(gpu: bool, device: str) -> list[Family]:
    families = []
    for name, record in RECORDS.items():
        for row in record.measured(gpu) if record.measured else (Measured((record.sizes,)),):
            fixed = {size: n for size, n in row.sizes[0].items() if all(other[size] == n for other in row.sizes)}
            numbers = " ".join(f"{LETTERS.get(size, size)}{n}" for size, n in fixed.items())
            for passes in OPS[name].passes[-1:] if row.backward_only else OPS[name].passes:
                cases = tuple(case(name, sizes, passes, row.dtype, device) for sizes in row.sizes)
                families.append(Family(" ".join(filter(None, (name, numbers, passes, row.dtype))), cases))
    return families


def _layers(gpu: bool, device: str) -> list[Family]:
    scifar = {"batch": 50 if gpu else 16, "length": 1024, "channels": 512}
    mamba = {"batch": 8, "length": 2048, "channels": 768} if gpu else {"batch": 16, "length": 256, "channels": 64}
    families = []
    for passes in ("forward", "forward+backward"):
        families.append(_family("lru", passes, device, (256, 28), {"batch": 50, "length": 784, "channels": 8}))
        families.append(_family("lru", passes, device, (384, 93), scifar))
        families.append(_family("mamba", passes, device, (128, 12), mamba))
        for op, states in (("s5", (384, 96)), ("s4d", (32, 8))):
            families.append(_family(op, passes, device, states, {"batch": 16, "length": 1024, "channels": 256}))
    return families if gpu else [*families, _family("loop", "step", device, (16,), {"channels": 4})]


def _steps(gpu: bool, device: str) -> list[Family]:
    scifar = {"batch": 50, "channels": 512, "blocks": 6} if gpu else {"batch": 16, "channels": 512, "blocks": 1}
    language = {"batch": 16, "channels": 512, "length": 1024, "blocks": 8} if gpu else dict(OPS["mamba-lm"].sizes)
    language.pop("states", None)
    return [
        _family("smnist", "step", device, (256, 47, 28, 13), {"batch": 50, "channels": 8, "blocks": 1}),
        _family("scifar", "step", device, (384, 161, 93, 57), scifar),
        _family("mamba-lm", "step", device, (128, 64, 32, 16, 12), language),
        replace(_family("mamba-lm", "step", device, (128, 12), language, "bfloat16"), only=("compressm",)),
    ]


def _reductions(gpu: bool, device: str) -> list[Family]:
    truncations = [
        case("balanced_truncation", {"channels": h, "states": n, "rank": r}, "step", device=device)
        for h, n, r in ((8, 256, 28), (512, 384, 93))
    ]
    ops = ("attempt", "attempt-s5", "rollback", "waiting")
    whole = [Family(op, (case(op, OPS[op].sizes, "step", device=device),)) for op in ops]
    return [Family("balanced_truncation", tuple(truncations)), *whole]


def _curves(gpu: bool, device: str) -> list[Family]:
    """Our time over N, L and batch around one point."""
    factor = 4 if gpu else 1
    selective = {"batch": 1 * factor, "channels": 128 * factor, "length": 1024, "states": 64}
    linear = {"batch": 4 * factor, "length": 1024, "channels": 64, "states": 128}
    over = {
        "states": (4, 8, 16, 32, 64, 128, 256, 512),
        "length": (256, 512, 1024, 2048, 4096),
        "batch": tuple(factor * b for b in (1, 2, 4, 8, 16)),
    }
    families = []
    for op, base in (("selective_scan", selective), ("lti_scan", linear)):
        points = itertools.chain.from_iterable(((name, size) for size in sizes) for name, sizes in over.items())
        cases = (case(op, {**base, name: size}, "forward+backward", device=device) for name, size in points)
        families.append(Family(f"{op} curves over N, L and batch", tuple(dict.fromkeys(cases)), ("compressm",)))
    return families
