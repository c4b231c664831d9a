"""What a benchmark run writes: one JSON file per kind of machine, checked whenever it is read or written.

Every figure stands beside what it takes to judge it: the error against the float64 reference, the spread of the samples, what
the computation moves and multiplies at the least, and the ceilings that the same run measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compressm.compression.common.files import write_atomically
from compressm.errors import DataError

FORMAT: Final = 1
Level = Literal["op", "layer", "step", "reduction"]
Pass = Literal["forward", "forward+backward", "step"]
Resource = Literal["bytes", "flops", "exponentials"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Ceilings(_Part):
    """What the machine sustains, measured in the run itself: GB/s read plus written by a copy, float32 matrix products in
    GFLOP/s, 1e9 exponentials per second."""

    copy_gb_per_s: float = Field(gt=0)
    matmul_gflop_per_s: float = Field(gt=0)
    exp_g_per_s: float = Field(gt=0)


class Milliseconds(_Part):
    """Median, 20th and 80th percentile and minimum over the rounds."""

    median: float = Field(gt=0)
    low: float = Field(gt=0)
    high: float = Field(gt=0)
    minimum: float = Field(gt=0)
    rounds: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Milliseconds:
        if not self.minimum <= self.low <= self.median <= self.high:
            raise ValueError("expected minimum <= low <= median <= high")
        return self


class Counts(_Part):
    """The least that the computation takes: bytes to and from memory, floating point operations, exponentials."""

    bytes: int = Field(ge=0)
    flops: int = Field(ge=0)
    exponentials: int = Field(ge=0)


class Result(_Part):
    """One contender of one group, right and timed.

    Attributes:
        group: whose contenders compute the same thing, e.g. ``"selective_scan B2 D512 L1024 N128 forward"``.
        op: the op, layer or training step, e.g. ``"selective_scan"``, ``"lru"``, ``"smnist"``.
        level: what is timed.
        shape: sizes by name, e.g. ``{"batch": 2, "channels": 512, "length": 1024, "states": 128}``.
        dtype: of the inputs, e.g. ``"float32"``.
        passes: ``"pass"`` in JSON.
        contender: ``"compressm"`` or a peer.
        milliseconds: of one call.
        peak_bytes: largest memory that a call held beyond its inputs, measured apart from time; None where unknown.
        error: largest relative error (2-norm) of the outputs and gradients against the float64 reference.
        counts: of the computation, alike for all contenders of a group.
        limit_ms: the time below which no implementation comes by these counts and ceilings; None without counts.
        limit_by: the ceiling that sets it.
    """

    group: str
    op: str
    level: Level
    shape: dict[str, int]
    dtype: str
    passes: Pass = Field(alias="pass")
    contender: str
    milliseconds: Milliseconds
    peak_bytes: int | None = Field(None, ge=0)
    error: float = Field(ge=0)
    counts: Counts
    limit_ms: float | None = Field(None, gt=0)
    limit_by: Resource | None = None

    @property
    def share_of_limit(self) -> float | None:
        """Limit over median: 1 would be as fast as the machine allows."""
        return None if self.limit_ms is None else self.limit_ms / self.milliseconds.median


class Missing(_Part):
    """A contender without a time: skipped as it is absent or does not do this, or failed as it raised or was wrong."""

    group: str
    contender: str
    reason: str


class Run(_Part):
    """One result file.

    Attributes:
        machine: as ``compressm.experiments.runs.machine`` describes it, with ``commit``, ``date`` (ISO 8601, UTC) and
            ``versions`` of the peers by name.
        ceilings: of the machine.
        results: one per group and contender.
        skipped, failed: contenders without a time, and why.
    """

    format: Literal[1] = FORMAT
    machine: dict[str, Any]
    ceilings: Ceilings
    results: tuple[Result, ...] = ()
    skipped: tuple[Missing, ...] = ()
    failed: tuple[Missing, ...] = ()

    @model_validator(mode="after")
    def _whole(self) -> Run:
        for key in ("cpu", "device", "torch", "commit", "date", "versions"):
            if key not in self.machine:
                raise ValueError(f"machine: {key} is missing")
        named = [(entry.group, entry.contender) for entry in self.entries]
        if twice := next((pair for pair in named if named.count(pair) > 1), None):
            raise ValueError(f"{twice[1]!r} occurs twice in the group {twice[0]!r}")
        return self

    @property
    def entries(self) -> tuple[Result | Missing, ...]:
        """With a time and without one."""
        return (*self.results, *self.skipped, *self.failed)

    def merged(self, newer: Run) -> Run:
        """This run with every group of a newer one in place of its own; machine and ceilings are the newer one's.

        Groups in this run keep their order, new ones follow.
        """
        fresh = {entry.group for entry in newer.entries}

        def joined(name: str) -> tuple:
            kept = [entry for entry in getattr(self, name) if entry.group not in fresh]
            return (*kept, *getattr(newer, name))

        order = {group: i for i, group in enumerate(dict.fromkeys(r.group for r in (*self.results, *newer.results)))}
        results = tuple(sorted(joined("results"), key=lambda r: order[r.group]))
        return newer.model_copy(update={"results": results, "skipped": joined("skipped"), "failed": joined("failed")})

    def save(self, path: Path) -> None:
        """Replace the file in one go, one line per result.

        Raises:
            DataError: it cannot be written; the old one is untouched.
        """
        body = self.model_dump(mode="json", by_alias=True)
        lists = {key: body.pop(key) for key in ("results", "skipped", "failed")}
        parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in body.items()]
        for key, entries in lists.items():
            lines = ",\n  ".join(json.dumps(entry, allow_nan=False) for entry in entries)
            parts.append(f"{json.dumps(key)}: [" + (f"\n  {lines}\n " if entries else "") + "]")
        _replace(path, "{\n " + ",\n ".join(parts) + "\n}\n")

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read and check a file.

        Raises:
            DataError: it cannot be read, or is not what a benchmark run wrote.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}), expected what make bench wrote") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "file"
            raise DataError(f"{path}: {place}: {first['msg']}. Expected what make bench wrote (format {FORMAT})") from error


def _replace(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}). Free space or choose another file") from error
