"""Fuzz compressm.load with hostile files: ``python tests/fuzz/checkpoints.py --files 10000 --seed 0``.

A file must be refused with a CompressmError that leaves everything as it was, or be taken exactly as it says: the model then
holds the file's tensors bit for bit, and training goes on.  Anything else is a finding; its file is kept.  With ``--atheris``,
where that package is installed, mutations are guided by coverage.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import math
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.checkpoint_files import MUTATIONS, WITHOUT_CHECKSUM, Parts

import compressm
from compressm.compression.common import random_states
from compressm.layers import LRU, Mamba

SECONDS = 5  # of processor time: on a busy machine the clock runs on


class Small(nn.Module):
    """One state-space layer with what else a model may hold: buffers, complex and tied parameters."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.mixer = mixer
        self.norm = nn.BatchNorm1d(4)
        self.phase = nn.Parameter(torch.ones(4, dtype=torch.complex64))
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.mixer(x)
        return self.head(self.norm(x.mean(1)) * self.phase.abs())


class Run:
    """A model, its optimizer and its compressor."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.model = Small(LRU(4, 6) if kind == "lru" else Mamba(4, d_state=5))
        named = dict(self.model.named_parameters())
        groups = [{"params": [p for n, p in named.items() if n != "phase"]}, {"params": [named["phase"]], "lr": 1e-3}]
        if kind == "lru":
            self.optimizer = torch.optim.AdamW(groups, lr=1e-2, amsgrad=True)
        else:
            self.optimizer = torch.optim.SGD(groups, lr=1e-2, momentum=0.9)
        policy, schedule = compressm.Shrink(0.4), compressm.At([2, 40])
        self.compressor = compressm.Compressor(self.model, self.optimizer, policy=policy, schedule=schedule)

    def step(self) -> None:
        tokens = torch.randint(5, (3, 6))
        nn.functional.cross_entropy(self.model(tokens), tokens[:, 0]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.compressor.step()

    def save(self, path: Path) -> bytes:
        extra = {"epoch": 1, "curve": [0.5] * 70, 3: (1, None), "ema": torch.ones(2)}
        options = {"optimizer": self.optimizer, "compressor": self.compressor, "extra": extra, "rng": True}
        return compressm.save(path, self.model, **options).read_bytes()

    def load(self, path: Path) -> Any:
        return compressm.load(path, self.model, optimizer=self.optimizer, compressor=self.compressor, rng=True)

    def fingerprint(self) -> list[Any]:
        """Everything that loading may change, identities included."""
        state = self.optimizer.state_dict()
        return [
            [(n, id(p), _bits(p)) for n, p in [*self.model.named_parameters(), *self.model.named_buffers()]],
            [[id(p) for p in group["params"]] for group in self.optimizer.param_groups],
            _plain(state),
            _plain(self.compressor.state_dict()),
            _plain(random_states.capture(self.model)),
        ]


def _bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def _plain(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return _bits(tree)
    if isinstance(tree, dict):
        return {key: _plain(item) for key, item in tree.items()}
    return [_plain(item) for item in tree] if isinstance(tree, list | tuple) else repr(tree)


class Harness:
    """Loads files into a run and judges what happened."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.path = kind, folder / f"{kind}.safetensors"
        run = Run(kind)
        for _ in range(3):
            run.step()
        assert len(run.compressor.history) == 1
        self.data = run.save(self.path)
        self.saved = run.fingerprint()
        self.target: Run | None = None

    def judge(self, data: bytes, mutation: str) -> str:
        """``"refused"``, ``"same"`` or ``"accepted"``; raises AssertionError for a finding, and whatever load raised."""
        if self.target is None:
            self.target = Run(self.kind)
        self.path.write_bytes(data)
        run, before = self.target, self.target.fingerprint()
        try:
            run.load(self.path)
        except compressm.CompressmError:
            assert run.fingerprint() == before, "a refused file has changed something"
            return "refused"
        self.target = None
        taken = [(n, bits) for n, _, bits in run.fingerprint()[0]] == [(n, bits) for n, _, bits in self.saved[0]]
        if mutation in WITHOUT_CHECKSUM:
            assert taken, "damage was accepted and has changed weights"
            assert run.fingerprint()[2:] == self.saved[2:], "damage was accepted and has changed state"
            return "same"
        self._check_taken(run, data)
        self._check_trains(run)
        return "same" if taken else "accepted"

    def _check_taken(self, run: Run, data: bytes) -> None:
        """The model holds what the file says, read by other means."""
        parts = Parts(data)
        model, buffers = parts.manifest["model"], dict(run.model.named_buffers())
        for name, value in run.model.state_dict().items():
            tensor = parts.tensors[model[name]["!tensor"]]
            stored = torch.view_as_real(value) if value.is_complex() else value
            assert torch.equal(stored, tensor.to(stored.dtype)), f"{name} is not what the file says"
            assert not torch.isnan(stored).any(), f"{name} holds NaN"
            assert name in buffers or torch.isfinite(stored).all(), f"{name} is not finite"
        assert run.compressor.ranks == parts.manifest["ranks"]
        assert run.compressor.step_count == parts.manifest["compressor"]["step"]
        state = [v for s in run.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        storages = [v.untyped_storage().data_ptr() for v in [*state, *run.model.parameters()] if v.numel()]
        assert len(set(storages)) == len(storages), "tensors share memory"

    def _check_trains(self, run: Run) -> None:
        try:
            run.step()
        except compressm.CompressmError:
            pass  # weights of a hostile file may have no reduction; that is said
        json.dumps(run.compressor.state_dict())


class Timeout(BaseException):
    """A file took too long."""


def _expired(*_: object) -> None:
    raise Timeout


class FromBytes(random.Random):
    """Random choices that are read from the fuzzer's bytes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self.bits, self.left = int.from_bytes(data, "little"), 8 * len(data)

    def getrandbits(self, count: int) -> int:
        if self.left < count:
            return super().getrandbits(count)
        value = self.bits & ((1 << count) - 1)
        self.bits, self.left = self.bits >> count, self.left - count
        return value

    def random(self) -> float:
        return self.getrandbits(53) / (1 << 53)


class Campaign:
    """Counts outcomes and keeps the files of findings."""

    def __init__(self, folder: Path, findings: Path) -> None:
        self.harnesses = [Harness(kind, folder) for kind in ("lru", "mamba")]
        self.findings, self.counts, self.slowest = findings, collections.Counter(), 0.0

    def one(self, draw: random.Random) -> None:
        harness, mutation = draw.choice(self.harnesses), draw.choice(sorted(MUTATIONS))
        data = MUTATIONS[mutation](draw, harness.data)
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            outcome = harness.judge(data, mutation)
            signal.setitimer(signal.ITIMER_PROF, 0)
        except (Exception, Timeout) as error:
            signal.setitimer(signal.ITIMER_PROF, 0)
            harness.target = None
            outcome = f"FINDING {type(error).__name__}"
            number = sum(v for k, v in self.counts.items() if "FINDING" in k)
            self.findings.mkdir(parents=True, exist_ok=True)
            (self.findings / f"{number}-{harness.kind}-{mutation}.safetensors").write_bytes(data)
            (self.findings / f"{number}-{harness.kind}-{mutation}.txt").write_text(traceback.format_exc())
        self.counts[f"{mutation}: {outcome}"] += 1
        self.slowest = max(self.slowest, time.process_time() - started)

    @property
    def failed(self) -> bool:
        return any("FINDING" in key for key in self.counts)

    def report(self) -> str:
        lines = [f"{count:8d}  {key}" for key, count in sorted(self.counts.items())]
        return "\n".join([*lines, f"{self.counts.total():8d}  files; slowest {self.slowest:.2f} s"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "checkpoint_findings")
    parser.add_argument("--atheris", action="store_true", help="mutations guided by coverage")
    options = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, _expired)
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), options.findings)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), resource.RLIM_INFINITY))
        if options.atheris:
            return _guided(campaign, options)
        draw = random.Random(options.seed)
        for _ in range(options.files):
            campaign.one(draw)
    print(campaign.report())
    return 1 if campaign.failed else 0


def _guided(campaign: Campaign, options: argparse.Namespace) -> int:
    import atheris

    files = ("saving.checkpoint", "saving.manifest", "saving.fitting", "common.codec", "common.types", "common.random_states")
    for module in (*files, "planning.report", "surgery.packed_optimizer"):
        loaded = sys.modules[f"compressm.compression.{module}"]
        for item in list(vars(loaded).values()):
            if callable(item) and getattr(item, "__module__", "") == loaded.__name__ and hasattr(item, "__code__"):
                item.__code__ = atheris.instrument_func(item).__code__

    def one(data: bytes) -> None:
        campaign.one(FromBytes(data))
        if campaign.counts.total() >= options.files:
            print(campaign.report(), flush=True)
            os._exit(1 if campaign.failed else 0)  # libFuzzer takes an exception for a finding

    atheris.Setup([sys.argv[0], f"-seed={options.seed + 1}", "-max_len=512", "-rss_limit_mb=0", "-verbosity=0"], one)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
