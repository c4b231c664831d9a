"""Whole training steps (data, forward, backward, optimizer) at several numbers of states, in turn, and the layer inside them.

    python benchmarks/training_step.py [smnist] [stdlib-lm] [--rounds 15] [--out benchmarks/results/training_step.json]

smnist: 1 LRU block, batch 50, 784 steps, H=8 (random pixels: only shapes matter).  stdlib-lm: the Mamba language model.
The layers are compared with the float64 reference before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lru_layer import gate, gradient_of, reference
from timing import Timing, interleaved, save, table

from compressm.experiments.batches import Batches
from compressm.experiments.datasets import Dataset
from compressm.experiments.settings import Settings, resolve
from compressm.experiments.tasks import ImageTask, Task, TextTask
from compressm.experiments.training import TrainingRun
from compressm.layers import LRU, Mamba


class RandomPixels(ImageTask):
    """Images of noise in the shapes of MNIST."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.device = settings, torch.device("cpu")
        pixels, labels = torch.randint(0, 256, (500, 784, 1), dtype=torch.uint8), torch.randint(0, 10, (500,))
        self.data = Dataset("random pixels", pixels, labels, pixels, labels, 10)
        self.batches = Batches(pixels, labels, settings.batch_size, settings.seed)


@dataclass(frozen=True)
class Model:
    """A preset's task, the states to time it at, and how its layer alone runs on the step's shapes."""

    task: Callable[[Settings], Task]
    states: tuple[int, ...]
    layer: Callable[[Settings, int], Callable[[], object]]


def lru_alone(settings: Settings, states: int) -> Callable[[], object]:
    shape = (settings.batch_size, 784, settings.d_model)
    layer, x, w = LRU(settings.d_model, states), torch.randn(shape, requires_grad=True), torch.randn(shape)
    gate(f"LRU N{states}", layer(x), reference(layer, x))
    return gradient_of(lambda m, u: m(u), layer, x, w)


def mamba_alone(settings: Settings, states: int) -> Callable[[], object]:
    shape = (settings.batch_size, settings.length, settings.d_model)
    layer, x, w = Mamba(settings.d_model, states), torch.randn(shape, requires_grad=True), torch.randn(shape)
    with torch.no_grad():
        gate(f"Mamba N{states}", layer(x), copy.deepcopy(layer).double()(x.double()))
    return gradient_of(lambda m, u: m(u), layer, x, w)


MODELS = {
    "smnist": Model(RandomPixels, (256, 128, 64, 28, 13), lru_alone),
    "stdlib-lm": Model(lambda settings: TextTask(settings, None, torch.device("cpu")), (128, 64, 32, 12), mamba_alone),
}


def step_case(task: Task, states: int) -> Callable[[], None]:
    """One optimizer step of the preset's model after another."""
    run = TrainingRun("full", task, [states] * task.settings.blocks, Path("unused.safetensors"))

    def step() -> None:
        run.train_step()
        run.record.step += 1

    return step


def summarise(name: str, model: Model, blocks: int, results: dict[str, Timing]) -> dict[str, dict[str, float]]:
    """Ratios to the full size, and the share of every step at N = 0 on the straight line through all measured N."""
    steps = {n: results[f"{name} step N{n}"].median for n in model.states}
    slope, constant = np.polyfit(list(steps), list(steps.values()), 1)
    print(f"{name}: line through the steps: {constant:.2f} ms + {slope * 1e3:.1f} us per state")
    full, found = steps[model.states[0]], {"independent_of_N": {}, "speed_up": {}}
    for n, step in steps.items():
        layers = blocks * results[f"{name} layer N{n}"].median
        found["independent_of_N"][f"N{n}"], found["speed_up"][f"N{n}"] = constant / step, full / step
        shares = f"layers {layers / step:4.0%} of it, independent of N {constant / step:4.0%}"
        print(f"N={n:4d}: {step:6.2f} ms, {shares}, {full / step:.2f}x faster than N={model.states[0]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{' or '.join(MODELS)}; all by default")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=NUMBER", help="a setting of the presets")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training_step.json")
    arguments = parser.parse_args()
    if unknown := set(arguments.models) - set(MODELS):
        parser.error(f"unknown model {', '.join(sorted(unknown))}; choose from {', '.join(MODELS)}")
    overrides = {key: int(value) for key, _, value in (text.partition("=") for text in arguments.set)}
    torch.manual_seed(0)
    cases: dict[str, Callable[[], object]] = {}
    settings = {name: resolve(name, overrides) for name in arguments.models or MODELS}
    for name, chosen in settings.items():
        task = MODELS[name].task(chosen)
        for n in MODELS[name].states:
            cases[f"{name} step N{n}"] = step_case(task, n)
            cases[f"{name} layer N{n}"] = MODELS[name].layer(chosen, n)
    results = interleaved(cases, arguments.rounds, warmup=3)
    print(table(results))
    found = {name: summarise(name, MODELS[name], chosen.blocks, results) for name, chosen in settings.items()}
    save(arguments.out, results, found)


if __name__ == "__main__":
    main()
