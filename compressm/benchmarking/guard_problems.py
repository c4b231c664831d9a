"""Problems of the guard: undoing a reduction, beside writing the same state to a file, and steps with nothing to do."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

import compressm
from compressm.benchmarking.problems import Answers, Contender, Op, Problem
from compressm.benchmarking.reduction_problems import NOT_COUNTED, REDUCTION, TAU, trained_stack
from compressm.benchmarking.request import SIZES
from compressm.benchmarking.results import Pass
from compressm.benchmarking.timing import Timed
from compressm.compression.common.models import compressible_layers
from compressm.compression.guard.snapshot import Parts, Snapshot
from compressm.compression.surgery.edits import reshape

IN_MEMORY, ON_DISK = 1 << 62, 0  # bytes above which a snapshot goes to disk
DISK = "compressm, on disk"
SAVE = "torch.save"
CALLS = 1000


def _joined(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten().cpu() for tensor in tensors])


def rollback(sizes: Mapping[str, int], passes: Pass, dtype: torch.dtype, device: torch.device) -> Problem:
    """Model and optimizer put aside, replaced by others of a quarter of the states, and put back."""
    model, optimizer = trained_stack(sizes, device)
    parts = Parts(model, compressible_layers(model), (optimizer,))
    fewer = dict.fromkeys(parts.layers, max(1, sizes["states"] // 4))

    def state() -> Tensor:
        return _joined([*model.parameters(), *(value for p in model.parameters() for value in optimizer.state[p].values())])

    problem = Problem("step", torch.float64, device, {}, None, {"state": state()}, NOT_COUNTED, dict(sizes))

    def undo(disk_bytes: int) -> Contender:
        def run() -> None:
            snapshot = Snapshot.take(parts, {}, disk_bytes, None)
            reshape(parts.model, parts.layers, fewer, parts.optimizers)
            snapshot.restore(parts)
            snapshot.close()

        def answers() -> Answers:
            run()
            return {"state": state()}

        return Contender(Timed(run), answers)

    def save() -> Contender:
        folder = Path(tempfile.mkdtemp())

        def run() -> None:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "state.pt")

        def answers() -> Answers:
            run()
            loaded = torch.load(folder / "state.pt")
            moments = [value for entry in loaded["optimizer"]["state"].values() for value in entry.values()]
            return {"state": _joined([*loaded["model"].values(), *moments])}

        weakref.finalize(run, shutil.rmtree, folder)
        return Contender(Timed(run), answers)

    problem.built_in["compressm"] = lambda: undo(IN_MEMORY)
    problem.built_in[DISK] = lambda: undo(ON_DISK)
    problem.built_in[SAVE] = save
    return problem


def waiting(sizes: Mapping[str, int], passes: Pass, dtype: torch.dtype, device: torch.device) -> Problem:
    """``Compressor.step`` a thousand times, under a guard, with nothing due."""
    model, optimizer = trained_stack(sizes, device)
    schedule, guard = compressm.Once(1 << 40), compressm.Rollback(lambda model: 0.0)
    policy = compressm.Energy(tau=TAU)
    compressor = compressm.Compressor(model, optimizer, policy=policy, schedule=schedule, guard=guard)
    cadence = compressor._cadence
    assert cadence is not None  # there is an optimizer
    cadence.took(0)
    compressor.step()
    oracle = {"steps": torch.tensor([float(CALLS)], dtype=torch.float64)}
    problem = Problem("step", torch.float64, device, {}, None, oracle, NOT_COUNTED, dict(sizes))

    def run() -> None:
        for _ in range(CALLS):
            cadence.took(0)  # as the optimizer's hook does
            compressor.step()

    def answers() -> Answers:
        before = compressor.step_count
        run()
        return {"steps": torch.tensor([float(compressor.step_count - before)], dtype=torch.float64)}

    problem.built_in["compressm"] = lambda: Contender(Timed(run), answers)
    return problem


OPS = {
    "rollback": Op(
        "reduction", SIZES["rollback"], REDUCTION, rollback, "putting model and optimizer aside and back, as the guard does",
    ),
    "waiting": Op(
        "reduction", SIZES["waiting"], REDUCTION, waiting, "Compressor.step() under a guard with nothing due, 1,000 times",
    ),
}  # fmt: skip
