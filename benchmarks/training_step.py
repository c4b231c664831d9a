"""Whole training steps (data, forward, backward, AdamW) at several numbers of states, in turn, and the layer inside them.

    python benchmarks/training_step.py [--rounds 15] [--out benchmarks/results/training_step.json]

Sequential MNIST: 1 block, batch 50, 784 steps, H=8 (random pixels: only shapes matter).  The layer is compared with the
float64 reference before anything is timed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from lru_layer import gate, gradient_of, reference
from timing import Timing, interleaved, save, table

from compressm.experiments.datasets import Dataset
from compressm.experiments.settings import resolve
from compressm.experiments.training import TrainingRun
from compressm.layers import LRU

STATES = (256, 128, 64, 28, 13)


def step_case(data: Dataset, states: int):
    """One optimizer step of the preset's model after another."""
    run = TrainingRun("full", resolve("smnist", {}), data, [states], Path("unused.safetensors"))

    def step() -> None:
        run.train_step()
        run.record.step += 1

    return step


def layer_case(states: int):
    """Forward and backward of the LRU alone, on the step's shapes."""
    layer, x, w = LRU(8, states), torch.randn(50, 784, 8, requires_grad=True), torch.randn(50, 784, 8)
    gate(f"layer N{states}", layer(x), reference(layer, x))
    return gradient_of(lambda m, u: m(u), layer, x, w)


def independent_share(results: dict[str, Timing]) -> dict[str, float]:
    """Share of the step outside the layer, and of the step at N = 0 on the straight line through all measured N."""
    slope, constant = np.polyfit(STATES, [results[f"step N{n}"].median for n in STATES], 1)
    print(f"line through the steps: {constant:.2f} ms + {slope * 1e3:.1f} us per state")
    shares = {}
    for n in STATES:
        step, layer = results[f"step N{n}"].median, results[f"layer N{n}"].median
        shares[f"N{n}"] = constant / step
        print(f"N={n:4d}: {step:6.2f} ms, layer {layer / step:4.0%} of it, independent of N {constant / step:4.0%}")
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training_step.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    pixels, labels = torch.randint(0, 256, (500, 784, 1), dtype=torch.uint8), torch.randint(0, 10, (500,))
    data = Dataset("random pixels", pixels, labels, pixels, labels, 10)
    cases = {f"step N{n}": step_case(data, n) for n in STATES} | {f"layer N{n}": layer_case(n) for n in STATES}
    results = interleaved(cases, arguments.rounds, warmup=3)
    print(table(results))
    shares = independent_share(results)
    for n in STATES[1:]:
        print(f"step N256 / N{n}: {results['step N256'].median / results[f'step N{n}'].median:.2f}x")
    save(arguments.out, results, {"independent_of_N": shares})


if __name__ == "__main__":
    main()
