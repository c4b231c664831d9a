"""Whole training steps of the models that the project reports on: data on the device, forward, backward, AdamW."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from compressm.experiments.tasks.models.language_model import LanguageModel
from compressm.experiments.tasks.models.lru import Classifier
from compressm.layers import Mamba
from gpu.part_layers import autocast

MODES = ("eager", "graph", "compile", "compile+graph")
WARM = 3  # steps in front of a capture


@dataclass(frozen=True)
class Workload:
    """A model at several numbers of states.

    Attributes:
        name: for tables.
        model: states -> model.
        shape: of a batch: (batch, L, channels) pixels, or (batch, L + 1) bytes of text.
        states: the largest first.
        dtype: bfloat16 stands for autocast.
    """

    name: str
    model: Callable[[int], nn.Module]
    shape: tuple[int, ...]
    states: tuple[int, ...]
    dtype: torch.dtype = torch.float32


def _classifier(channels: int, d_model: int, blocks: int) -> Callable[[int], nn.Module]:
    scale = {"mean": torch.full((channels,), 127.0), "std": torch.full((channels,), 70.0)}
    return lambda n: Classifier(channels, 10, d_model, [n] * blocks, dropout=0.1, **scale)


def _mamba(d_model: int, states: Sequence[int]) -> LanguageModel:
    return LanguageModel(d_model, states, "mamba", partial(Mamba, d_model))


WORKLOADS = (
    Workload("sMNIST LRU", _classifier(1, 8, 1), (50, 784, 1), (256, 47, 28, 13)),
    Workload("sCIFAR LRU", _classifier(3, 512, 6), (50, 1024, 3), (384, 161, 93, 57)),
    Workload(
        "Mamba LM", lambda n: _mamba(1024, [n] * 4), (8, 2049), (128, 64, 32, 16, 12), torch.bfloat16
    ),
)
SMOKE = (
    Workload("LRU", _classifier(1, 2, 1), (2, 6, 1), (3, 2)),
    Workload("Mamba LM", lambda n: _mamba(4, [n]), (1, 5), (2,), torch.bfloat16),
)


class Step:
    """One optimizer step after another on one batch; calling it returns the loss, as a tensor."""

    def __init__(self, work: Workload, states: int, device: str) -> None:
        torch.manual_seed(0)
        self.model = work.model(states).to(device).train()
        self.dtype = work.dtype
        self.batch = torch.randint(0, 256, work.shape, device=device, dtype=torch.uint8)
        self.labels = torch.randint(0, 10, work.shape[:1], device=device)
        cuda = device == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=cuda, capturable=cuda)
        self._replay: Callable[[], object] | None = None
        self._loss: Tensor | None = None

    @torch.no_grad()
    def error(self) -> float:
        """Relative error of the model's scores for the last example in float32 against itself in float64."""
        inputs = self.batch[-1:] if self.batch.dim() == 3 else self.batch[-1:, :-1]
        self.model.eval()
        exact = copy.deepcopy(self.model).double()
        scores, expected = self.model(inputs).double(), exact(inputs)
        self.model.train()
        return ((scores - expected).norm() / expected.norm()).item()

    def compile(self, backend: str) -> None:
        """Compile every residual block around our ops; equal blocks share the code."""
        for block in self.model.blocks:
            block.compile(dynamic=False, backend=backend)

    def capture(self) -> None:
        """Record the step as a CUDA graph, which calls replay from now on."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._loss = self._run()
        self._replay = graph.replay

    def __call__(self) -> Tensor:
        if self._replay is None:
            return self._run()
        self._replay()
        return self._loss

    def _run(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.batch, self.dtype):
            if self.batch.dim() == 3:
                loss = nn.functional.cross_entropy(self.model(self.batch), self.labels)
            else:
                scores = self.model(self.batch[:, :-1])
                loss = nn.functional.cross_entropy(scores.flatten(0, 1).float(), self.batch[:, 1:].flatten().long())
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def make(work: Workload, states: int, mode: str, device: str, backend: str) -> Step:
    """A step in one of MODES."""
    step = Step(work, states, device)
    if "compile" in mode:
        step.compile(backend)
    if "graph" in mode:
        step.capture()
    return step
