"""Kill training at random moments and resume it: ``python tests/fuzz/checkpoint_kills.py --kills 200 --seed 0``.

A process trains a model with dropout and four reductions, saves after every step and is killed with SIGKILL; another one goes
on from its checkpoint.  Every loss that any of them has seen must be that of a run that nobody interrupted, bit for bit, and
so must the weights at the end.  Processes are forked from one that has imported torch and computed nothing.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import mmap
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import compressm
from compressm.compression.saving import checkpoint
from compressm.layers import LRU

STEPS, REDUCTIONS = 30, (5, 10, 15, 20)
PHASES = ("starting", "training", "reducing", "saving", "done")


class Model(nn.Module):
    """(batch, length, 3) -> (batch, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 6)
        self.lru = LRU(6, 16)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.drop(self.lru(self.encoder(x))).mean(1))


def train(path: Path, log: Path, seed: int, phase: mmap.mmap | None = None) -> str:
    """Train from the checkpoint, or from the start, to the end; returns a digest of the weights."""

    def enter(name: str) -> None:
        if phase is not None:
            phase[0] = PHASES.index(name)

    torch.manual_seed(seed)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    calibration = [torch.randn(4, 12, 3, generator=torch.Generator().manual_seed(seed))]
    policy, schedule = compressm.Shrink(0.2), compressm.At(REDUCTIONS)
    compressor = compressm.Compressor(model, optimizer, policy=policy, schedule=schedule, calibration=calibration)
    if path.exists():
        extra = compressm.load(path, model, optimizer=optimizer, compressor=compressor, rng=True)
        scheduler.load_state_dict(extra["scheduler"])
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while compressor.step_count < STEPS:
        enter("training")
        x = torch.randn(8, 12, 3)
        loss = nn.functional.cross_entropy(model(x), (x.sum((1, 2)) > 0).long())
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        enter("reducing" if compressor.schedule.due(compressor.step_count + 1) else "training")
        compressor.step()
        os.write(descriptor, f"{compressor.step_count} {loss.item().hex()}\n".encode())
        enter("saving")
        compressm.save(
            path, model, optimizer=optimizer, compressor=compressor, extra={"scheduler": scheduler.state_dict()}, rng=True
        )
    os.close(descriptor)
    enter("done")
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(f"{tuple(value.shape)}".encode() + value.numpy().tobytes())
    return digest.hexdigest()


def forked(work, *args) -> int:
    """Process id of a child that does ``work`` and ends with 0, or with 3 after an error."""
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        work(*args)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def child(path: Path, log: Path, result: Path, seed: int, phase: mmap.mmap) -> None:
    result.write_text(train(path, log, seed, phase))


def losses(log: Path) -> dict[int, set[str]]:
    """By step, all values that were seen."""
    seen: dict[int, set[str]] = collections.defaultdict(set)
    for line in log.read_text().splitlines() if log.exists() else []:
        step, loss = line.split()
        seen[int(step)].add(loss)
    return seen


class Campaign:
    """Runs that are killed and resumed; ``counts`` says what happened."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.phase = mmap.mmap(-1, 1)
        self.lifetime = 1.0

    def reference(self, seed: int) -> tuple[dict[int, set[str]], str]:
        """Losses and digest of the run that nobody interrupts."""
        places = [self.folder / f"reference{seed}.{end}" for end in ("safetensors", "log", "digest")]
        started = time.perf_counter()
        _, status = os.waitpid(forked(child, *places, seed, self.phase), 0)
        if status:
            raise RuntimeError("the uninterrupted run has failed")
        self.lifetime = time.perf_counter() - started
        return losses(places[1]), places[2].read_text()

    def one_run(self, seed: int, kills: int) -> int:
        """Train one run to its end; returns the kills that it took, at most ``kills``."""
        expected, digest = self.reference(seed)
        path, log, result = (self.folder / f"run{seed}.{end}" for end in ("safetensors", "log", "digest"))
        killed = 0
        while True:
            self.phase[0] = 0
            process = forked(child, path, log, result, seed, self.phase)
            if killed < kills:
                time.sleep(self.draw.uniform(0, 0.3) * self.lifetime)
                os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            if os.WIFEXITED(status):
                if os.WEXITSTATUS(status):
                    self.counts["LOST: could not be resumed"] += 1
                break
            killed += 1
            self.counts[f"killed while {PHASES[self.phase[0]]}"] += 1
            self.counts["kills that left a temporary file"] += bool(list(self.folder.glob(f".{path.name}.*.tmp")))
            self.counts["CORRUPT checkpoints"] += not self._readable(path)
        self.counts["runs"] += 1
        self.counts["LOST: other losses"] += losses(log) != expected
        self.counts["LOST: other weights"] += not result.exists() or result.read_text() != digest
        self.counts["temporary files at the end"] += len(list(self.folder.glob(f".{path.name}.*.tmp")))
        return killed

    @staticmethod
    def _readable(path: Path) -> bool:
        if not path.exists():
            return True  # killed before the first save
        try:
            checkpoint.read(path)
        except compressm.CompressmError:
            traceback.print_exc()
            return False
        return True

    @property
    def failed(self) -> bool:
        return any(count for name, count in self.counts.items() if name.startswith(("LOST", "CORRUPT")))


def campaign(folder: Path, kills: int, seed: int, per_run: int) -> Campaign:
    """At least ``kills`` kills, up to ``per_run`` of them in a run."""
    torch.set_num_threads(1)
    result = Campaign(folder, seed)
    done, number = 0, 0
    while done < kills:
        done += result.one_run(1000 * seed + number, min(per_run, kills - done))
        number += 1
    result.counts["kills"] = done
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-run", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = campaign(Path(folder), options.kills, options.seed, options.per_run)
    for name, count in sorted(result.counts.items()):
        print(f"{count:6d}  {name}")
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main())
