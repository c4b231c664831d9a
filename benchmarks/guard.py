"""What the guard costs: a step with nothing pending, a snapshot and a rollback, for six layers with N=384, H=512.

    python benchmarks/guard.py [--rounds 5] [--out benchmarks/results/guard.json]

Before timing, everything is scrambled, given other sizes and restored, and must be what it was bit for bit.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path

import torch
from reduction import CHANNELS as WIDTH
from reduction import LAYERS, STATES, TAU, trained_stack
from timing import interleaved, save, table

import compressm
from compressm.compression.planning import compressible_layers
from compressm.compression.snapshot import Parts, Snapshot
from compressm.compression.surgery import reshape

CALLS = 100_000


def tensors_of(parts: Parts) -> list[torch.Tensor]:
    """Parameters, buffers, optimizer state and torch's random state."""
    (optimizer,) = parts.optimizers
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [*parts.model.parameters(), *parts.model.buffers(), *moments, torch.get_rng_state()]


def shrink(parts: Parts) -> None:
    """Other sizes without the work of a reduction: blank parameters, no moments."""
    reshape(parts.model, parts.layers, dict.fromkeys(parts.layers, STATES // 4), parts.optimizers)


def check_restored(parts: Parts, disk_bytes: int) -> None:
    """Stop unless a rollback is exact."""
    before = copy.deepcopy(tensors_of(parts))
    snapshot = Snapshot.take(parts, {"step": 1}, disk_bytes, None)
    shrink(parts)
    with torch.no_grad():
        for tensor in tensors_of(parts)[:-1]:
            tensor.add_(1)
    torch.rand(7)
    snapshot.restore(parts)
    after = tensors_of(parts)
    snapshot.close()
    if len(before) != len(after) or not all(map(torch.equal, before, after)):
        raise SystemExit(f"a rollback with disk_bytes={disk_bytes} is not exact; not timed")


def idle_microseconds(batch: torch.Tensor, guard: compressm.Rollback | None) -> float:
    """One Compressor.step() in which nothing is due, mean over many."""
    model, optimizer = trained_stack(batch)
    schedule = compressm.Once(10 * CALLS)
    compressor = compressm.Compressor(model, optimizer, policy=compressm.Energy(tau=TAU), schedule=schedule, guard=guard)
    compressor._cadence.took(0)
    start = time.perf_counter()
    for _ in range(CALLS):
        compressor._cadence.took(0)
        compressor.step()
    return (time.perf_counter() - start) / CALLS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "guard.json")
    arguments = parser.parse_args()
    batch = torch.randn(2, 128, WIDTH)
    model, optimizer = trained_stack(batch)
    parts = Parts(model, compressible_layers(model), (optimizer,))
    for disk_bytes in (8 << 30, 0):
        check_restored(parts, disk_bytes)
    print("rollback, in memory and on disk: exact")
    kept = {disk: Snapshot.take(parts, {}, disk, None) for disk in (8 << 30, 0)}
    target = Path(tempfile.mkdtemp()) / "state.pt"

    def torch_save() -> None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, target)

    def snapshot(disk_bytes: int):
        return lambda: Snapshot.take(parts, {}, disk_bytes, None).close()

    def restore(disk_bytes: int):
        def run() -> None:
            shrink(parts)
            kept[disk_bytes].restore(parts)

        return run

    def training_step() -> None:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    cases = {
        "torch.save": torch_save,
        "snapshot": snapshot(8 << 30),
        "restore": restore(8 << 30),
        "snapshot on disk": snapshot(0),
        "restore from disk": restore(0),
        "training step": training_step,
    }
    results = interleaved(cases, arguments.rounds)
    target.unlink()
    idle = {name: idle_microseconds(batch, guard) for name, guard in (("none", None), ("guard", compressm.Rollback(len)))}
    megabytes = kept[0].nbytes / 1e6
    print(f"{megabytes:.0f} MB of state\n{table(results)}")
    saving = results["torch.save"].median
    for name, where in (("in memory", ""), ("on disk", " on disk")):
        both = results["snapshot" + where].median + results["restore" + where.replace(" on", " from")].median
        print(f"snapshot and restore {name}: {both / saving:.2f} x torch.save")
    share = idle["guard"] / 1e3 / results["training step"].median
    print(f"step() with nothing due: {idle['guard']:.2f} us with a guard, {idle['none']:.2f} us without; {share:.2e} of a step")
    extra = {"layers": LAYERS, "N": STATES, "H": WIDTH, "megabytes": megabytes, "idle_microseconds": idle, "idle_share": share}
    save(arguments.out, results, extra)


if __name__ == "__main__":
    main()
