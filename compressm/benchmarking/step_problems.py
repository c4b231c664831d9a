"""Problems of whole training steps, as ``compressm train`` runs them: data, forward, backward, clipping, optimizer, scheduler.

The data are noise in the shapes of the real ones: only shapes matter.  What is checked is the loss and all gradients of the
model at its initial parameters without dropout; what is timed is one step after another of a model that trains.  In bfloat16
the forward runs under autocast, as with ``--set autocast=bfloat16``; no limits are counted then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressm.benchmarking import counts
from compressm.benchmarking.layer_problems import in_compiled_chunks, lru_operands, mamba_with, torch_convolution
from compressm.benchmarking.op_problems import COMPILED
from compressm.benchmarking.problems import Answers, Contender, Function, Op, Problem, slabs_for
from compressm.benchmarking.reduction_problems import NOT_COUNTED
from compressm.benchmarking.request import SIZES
from compressm.benchmarking.results import Counts, Pass
from compressm.benchmarking.timing import Timed
from compressm.experiments.methods.full import Full
from compressm.experiments.settings import resolve
from compressm.experiments.tasks.datasets.sequences import Sequences
from compressm.experiments.tasks.datasets.texts import BYTES, Text
from compressm.experiments.tasks.parts import BlockModel
from compressm.experiments.tasks.settings import Settings
from compressm.experiments.tasks.task import Task
from compressm.experiments.training import TrainingRun, count_parameters

BATCHES_OF_NOISE = 4
Change = Callable[[BlockModel], None]  # of a model, in place, before its optimizer is made


class Changed(Full):
    """The model of full size, changed in place before its optimizer is made.

    Args:
        change: of the model; None leaves it as it is.
    """

    def __init__(self, change: Change | None) -> None:
        self.change = change

    def start(self, task: Task, states: Sequence[int]) -> BlockModel:
        model = super().start(task, states)
        if self.change is not None:
            self.change(model)
        return model


def noisy_images(settings: Settings, length: int, channels: int) -> Sequences:
    """Pixels without meaning in the shapes of a dataset."""
    count = BATCHES_OF_NOISE * settings.batch_size
    x, y = torch.randint(0, 256, (count, length, channels), dtype=torch.uint8), torch.randint(0, 10, (count,))
    return Sequences("noise", x, y, x, y, 10)


def noisy_text() -> Text:
    """Bytes without meaning."""
    noise = torch.randint(0, BYTES, (1 << 20,), dtype=torch.uint8)
    return Text("noise", dict.fromkeys(("train", "validation", "test"), noise), 0, "")


class Foreign(nn.Module):
    """A block's layer computed by another function of x and its parameters.

    Args:
        layer: whose parameters are used.
        function: of ``{"x": x, **parameters}``.
    """

    def __init__(self, layer: Any, function: Function) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    @property
    def d_state(self) -> int:
        return self.layer.d_state

    def forward(self, x: Tensor) -> Tensor:
        return self.function({"x": x, **dict(self.layer.named_parameters())})


def replaced(mixer: str, make: Callable[[nn.Module], nn.Module]) -> Change:
    """Puts ``make(layer)`` in the place of every block's layer."""

    def change(model: BlockModel) -> None:
        for block in model.blocks:
            setattr(block, mixer, make(getattr(block, mixer)))

    return change


def gradients(model: nn.Module, task: Task, slabs: int = 1) -> Answers:
    """Loss on the first batch and all gradients one after the other, without dropout.

    In float64 for a float64 model, else under the task's autocast.
    The order is that of the parameters' names in the original model: a module that stands for a layer calls it ``layer``.
    """
    model.eval()
    model.zero_grad()
    batch = task.objective.batches[0]
    count, device = len(batch[0]), batch[0].device
    total = torch.zeros((), dtype=torch.float64, device=device)
    rounded = task.settings.autocast is not None and next(model.parameters()).dtype == torch.float32
    for chosen in torch.arange(count, device=device).chunk(slabs):
        with torch.autocast(task.device.type, torch.bfloat16, enabled=rounded):
            part = task.objective.outcome(model, tuple(tensor[chosen] for tensor in batch)).loss
        share = len(chosen) / count
        (part * share).backward()
        total += part.detach().double() * share
    by_name = {name.replace(".layer.", "."): p.grad for name, p in model.named_parameters()}
    found = torch.cat([gradient.flatten() for _, gradient in sorted(by_name.items()) if gradient is not None])
    model.zero_grad()
    return {"loss": total, "gradients": found.clone()}


def training_run(problem: Problem, change: Change | None = None) -> TrainingRun:
    """The problem's model with its optimizer at the start of training, its layers replaced by ``change``."""
    return _run(problem.extras["task"], change)


def _run(task: Task, change: Change | None = None) -> TrainingRun:
    return TrainingRun(Changed(change), task, Path("unused.safetensors"))


def step_contender(problem: Problem, change: Change | None = None) -> Contender:
    """The training step of the problem's model, its layers replaced by ``change``."""
    run = training_run(problem, change)

    def step() -> None:
        run.train_step()
        run.record.step += 1

    return Contender(Timed(step), lambda: gradients(training_run(problem, change).model, run.task), warms=False)


def _problem(task: Task, sizes: Mapping[str, int], dtype: torch.dtype, least: Counts, cells: int) -> Problem:
    settings = task.settings
    run = _run(task)
    exact = copy.deepcopy(run.model).double()
    oracle = gradients(exact, task, slabs_for(cells, settings.batch_size, task.device))
    least = counts.add(least, counts.adamw(count_parameters(run.model))) if dtype == torch.float32 else NOT_COUNTED
    problem = Problem("step", dtype, task.device, {}, None, oracle, least, dict(sizes), {"task": task})
    problem.built_in["compressm"] = lambda: step_contender(problem)
    problem.built_in[COMPILED] = lambda: step_contender(problem, _compiled_layers(task.model.mixer))
    return problem


def _compiled_layers(mixer: str) -> Change:
    if mixer == "lru":
        scan = in_compiled_chunks("lti_scan")
        return replaced(mixer, lambda layer: Foreign(layer, lambda p: scan(lru_operands(p))))
    function = mamba_with(in_compiled_chunks("selective_scan"), torch_convolution)
    return replaced(mixer, lambda layer: Foreign(layer, function))


def _images(preset: str, length: int, pixel_channels: int) -> Callable[..., Problem]:
    def build(sizes: Mapping[str, int], passes: Pass, dtype: torch.dtype, device: torch.device) -> Problem:
        batch, channels, states, blocks = (sizes[name] for name in ("batch", "channels", "states", "blocks"))
        chosen = {"batch_size": batch, "d_model": channels, "d_state": states, "blocks": blocks}
        settings = _settings(preset, chosen, dtype, device)
        task = Task(settings, noisy_images(settings, length, pixel_channels), device)
        rows = batch * length
        scan = counts.of_op("lti_scan", {**sizes, "length": length}, 4, True)
        block = counts.add(scan, counts.linear(rows, channels, 2 * channels, True))
        ends = counts.add(counts.linear(rows, pixel_channels, channels, True), counts.linear(batch, channels, 10, True))
        return _problem(task, sizes, dtype, counts.add(counts.scaled(block, blocks), ends), rows * states * blocks)

    return build


def _language_model(sizes: Mapping[str, int], passes: Pass, dtype: torch.dtype, device: torch.device) -> Problem:
    batch, length, channels, states, blocks = (
        sizes[name] for name in ("batch", "length", "channels", "states", "blocks")
    )
    chosen = {"batch_size": batch, "d_model": channels, "d_state": states, "blocks": blocks, "length": length}
    task = Task(_settings("stdlib-lm", chosen, dtype, device), noisy_text(), device)
    rows = batch * length
    block = counts.mamba(batch, length, channels, states, 4, True)
    least = counts.add(counts.scaled(block, blocks), counts.linear(rows, channels, BYTES, True))
    return _problem(task, sizes, dtype, least, rows * 2 * channels * states * blocks)


def _settings(preset: str, chosen: Mapping[str, object], dtype: torch.dtype, device: torch.device) -> Settings:
    autocast = "bfloat16" if dtype == torch.bfloat16 else None
    return resolve(preset, {**chosen, "runs": [Full.name], "autocast": autocast, "device": str(device)})


STEP: tuple[Pass, ...] = ("step",)
OPS = {
    "smnist": Op(
        "step", SIZES["smnist"], STEP, _images("smnist", 784, 1),
        "a training step of the paper's sequential MNIST model",
    ),
    "scifar": Op(
        "step", SIZES["scifar"], STEP, _images("scifar", 1024, 3),
        "a training step of the paper's sequential CIFAR model; the whole has 6 blocks and batch 50",
    ),
    "mamba-lm": Op(
        "step", SIZES["mamba-lm"], STEP, _language_model,
        "a training step of the Mamba language model",
    ),
}  # fmt: skip
