"""A reduction of six layers with N=384, H=512, from reading the layers to the audit of the optimizer.

    python benchmarks/reduction.py [--rounds 5] [--out benchmarks/results/reduction.json]

Before timing, the data-free Hankel singular values of a golden system are compared with 256-bit arithmetic.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from timing import interleaved, save, table
from torch import nn

import compressm
from compressm.layers import LRU

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "data"
LAYERS, STATES, CHANNELS, TAU = 6, 384, 512, 0.1


class Stack(nn.Module):
    """Six LRU layers with skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.lrus = nn.ModuleList(LRU(CHANNELS, STATES) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for lru in self.lrus:
            x = x + nn.functional.gelu(lru(x))
        return x


def check_golden() -> float:
    """Largest error of the Hankel singular values relative to the largest one, over all golden systems."""
    worst = 0.0
    for path in sorted(GOLDEN.glob("lti_*.npz")):
        with np.load(path) as archive:
            lam, B, C, oracle = (torch.from_numpy(archive[key]) for key in ("lambdas", "B", "C", "hsv_ref"))
        hsv = compressm.DiagonalSystem.from_lam(lam, B, C).hankel_singular_values("complex")
        worst = max(worst, float((hsv - oracle).abs().max() / oracle[0]))
    if not worst < 1e-12:
        raise SystemExit(f"Hankel singular values: error {worst:.1e} relative to the largest; not timed")
    return worst


def trained_stack(batch: torch.Tensor) -> tuple[Stack, torch.optim.Optimizer]:
    """A stack whose optimizer has moments."""
    torch.manual_seed(0)
    model = Stack()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "reduction.json")
    arguments = parser.parse_args()
    error = check_golden()
    print(f"golden Hankel singular values: error {error:.1e} of the largest")
    batch = torch.randn(2, 128, CHANNELS)
    pristine = trained_stack(batch)
    ranks = {}

    def reduction(**options):
        def run() -> None:
            model, optimizer = copy.deepcopy(pristine)
            policy, schedule = compressm.Energy(tau=TAU), compressm.At([1])
            compressor = compressm.Compressor(model, optimizer, policy=policy, schedule=schedule, **options)
            report = compressor.step()
            ranks[str(sorted(options))] = report.ranks
            assert report.changed

        return run

    calibration = [torch.randn(8, 256, CHANNELS)]
    cases = {
        "default, data-free": reduction(),
        "default, data Gramians (8 x 256)": reduction(calibration=calibration),
        "paper": reduction(recipe="paper"),
        "copy of model and optimizer (in each of the above)": lambda: copy.deepcopy(pristine),
    }
    results = interleaved(cases, arguments.rounds)
    print(table(results))
    print(f"ranks: {ranks}")
    save(arguments.out, results, {"layers": LAYERS, "N": STATES, "H": CHANNELS, "tau": TAU, "golden_error": error})


if __name__ == "__main__":
    main()
