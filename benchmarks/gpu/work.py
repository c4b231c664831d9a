"""What runs in a job's own process: checks, and launches for a sanitizer or a profiler to look at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gpu import checks, peers, problems, sweep
from gpu.tunables import tunables


def main(work: str, device: str, smoke: bool, out: Path) -> None:
    """Do the comma-separated pieces of work and append their rows to ``out`` as they come."""
    with out.open("a") as file:
        for piece in work.split(","):
            for row in PIECES[piece.partition(":")[0]](piece.partition(":")[2], device, smoke):
                file.write(json.dumps(row, default=str) + "\n")
                file.flush()


def _checks(what: str, device: str, smoke: bool) -> Iterator[dict[str, Any]]:
    """op:dtype:shard/shards"""
    op, dtype, share = what.split(":")
    shard, shards = map(int, share.split("/"))
    for case in checks.cases(op, dtype, smoke)[shard::shards]:
        modes = (True,) if smoke else (True, False)
        yield {"table": "checks", **checks.run(op, case, dtype, device, modes)}


def _large(_: str, device: str, smoke: bool) -> Iterator[dict[str, Any]]:
    for row in checks.run_large(device, smoke):
        yield {"table": "checks", **row}


def _sweep(share: str, device: str, smoke: bool) -> Iterator[dict[str, Any]]:
    """shard/shards"""
    shard, shards = map(int, share.split("/"))
    for row in sweep.check_all(device, smoke, shard, shards):
        yield {"table": "configurations", **row}


def _small(_: str, device: str, smoke: bool) -> Iterator[dict[str, Any]]:
    """Every kernel once on a small shape, for a sanitizer; what it computes is not looked at here."""
    made = [
        problems.problem(op, check, torch.float32, device)
        for op in checks.ops().values()
        for check in ([op.gpu_cases().SMOKE] if smoke else op.gpu_cases().SMALL)
    ]
    for number, problem in enumerate(made):
        for deterministic in (True, False):
            with checks.Mode(deterministic):
                problems.evaluate(problem, problem.inputs, "triton")
        yield {"table": "launched", "problem": number}


def _profile(_: str, device: str, smoke: bool) -> Iterator[dict[str, Any]]:
    """The launches that a profiler counts, one each after one that compiles."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    for tunable in tunables():
        shape = tunable.smoke if smoke else tunable.profiled
        if shape is not None:
            tunable.build(shape, None, device)()
            yield {"table": "launched", "problem": f"{tunable.name} {shape}"}


def _mamba(source: str, device: str, smoke: bool) -> Iterator[dict[str, Any]]:
    yield {"table": "built", "folder": str(peers.build_mamba(Path(source)))}


PIECES = {"checks": _checks, "large": _large, "sweep": _sweep, "small": _small, "profile": _profile, "mamba": _mamba}
