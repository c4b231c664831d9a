"""What a training run needs to know about its task: data, model, loss, measurement."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import compressm
from compressm.compression import Policy
from compressm.experiments import datasets, texts
from compressm.experiments.batches import Batches
from compressm.experiments.language_model import EXPAND, LanguageModel, evaluate_windows, prediction_loss
from compressm.experiments.language_model import parameter_groups as language_groups
from compressm.experiments.metrics import ACCURACY, BITS_PER_BYTE, Metric
from compressm.experiments.models import Classifier, evaluate, parameter_groups
from compressm.experiments.settings import Settings
from compressm.kernels import KernelPlan, cross_entropy

EVALUATION_BATCH = 250
NATS_PER_BIT = math.log(2)


class Task(ABC):
    """One task with its data, on the device that trains.

    Args:
        settings: of the whole command.
        folder: of the data files; None takes the usual source.
        device: that trains.

    Raises:
        DataError, ConfigError: the data cannot be read, or are too few.
    """

    metric: ClassVar[Metric]
    mixer: ClassVar[str]  # attribute of a block that is its state-space layer
    notes: ClassVar[tuple[str, ...]] = ()  # for the reader of the report
    batches: Batches | texts.WindowBatches

    def __init__(self, settings: Settings, folder: Path | None, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.load(folder)

    @abstractmethod
    def load(self, folder: Path | None) -> None:
        """Read the data, and make ``batches`` of them."""

    def calibration(self) -> list[Tensor]:
        """Batches of training inputs for data Gramians, the same at every call."""
        return self.batches.calibration(self.settings.calibration_sequences)

    @abstractmethod
    def describe(self) -> dict[str, int | str]:
        """The dataset, for the report."""

    @staticmethod
    @abstractmethod
    def blank_model(settings: Settings, dataset: Mapping[str, Any]) -> nn.Module:
        """A model of full size whose parameters and buffers a checkpoint is loaded into; ``dataset`` as :meth:`describe`."""

    @abstractmethod
    def build_model(self, run: str, states: Sequence[int]) -> nn.Module:
        """The model of a run with the seed's initial parameters; ``states`` of every block."""

    @abstractmethod
    def parameter_groups(self, model: nn.Module) -> list[dict]:
        """For AdamW."""

    @property
    @abstractmethod
    def policy(self) -> Policy:
        """How many states a reduction leaves."""

    @abstractmethod
    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, Tensor]:
        """Loss on the batch of a step, to be minimised, and its tally for the metric: a float32 or integer scalar.

        Tallies are summed in float64, exactly, so that a curve does not depend on where a run was interrupted.
        """

    @abstractmethod
    def from_tally(self, tally: float, steps: int) -> float:
        """The metric on the batches of some steps from the sum of their tallies."""

    @abstractmethod
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """The metric under its key, the ``loss`` and what else belongs to them, on ``"test"`` or what the metric watches."""

    @abstractmethod
    def result(self, model: nn.Module, last: dict[str, float]) -> dict[str, Any]:
        """What a run ends with, on ``"test"``; ``last`` is its last evaluation."""

    @abstractmethod
    def kernel_plan(self) -> KernelPlan:
        """What a layer of full size runs in training; builds the C++ kernels if they are not there yet."""


class ImageTask(Task):
    """Which class an image belongs to, read pixel by pixel by an LRU model."""

    metric = ACCURACY
    mixer = "lru"

    def load(self, folder: Path | None) -> None:
        settings = self.settings
        self.data = datasets.load(settings.dataset, folder).to(self.device)
        self.batches = Batches(self.data.train_x, self.data.train_y, settings.batch_size, settings.seed)

    def describe(self) -> dict[str, int | str]:
        return self.data.describe()

    @staticmethod
    def blank_model(settings: Settings, dataset: Mapping[str, Any]) -> Classifier:
        channels, classes = int(dataset["channels"]), int(dataset["classes"])
        states, blank = [settings.d_state] * settings.blocks, torch.zeros(channels)
        return Classifier(channels, classes, settings.d_model, states, mean=blank, std=blank, dropout=settings.dropout)

    def build_model(self, run: str, states: Sequence[int]) -> Classifier:
        s, data = self.settings, self.data
        torch.manual_seed(s.seed)
        mean, std = data.statistics()
        phase = s.narrow_max_phase if run == "small_narrow" else s.max_phase
        ring = {"r_min": s.r_min, "r_max": s.r_max, "max_phase": phase}
        channels = data.train_x.shape[-1]
        model = Classifier(channels, data.classes, s.d_model, states, mean=mean, std=std, dropout=s.dropout, **ring)
        return model.to(self.device)

    def parameter_groups(self, model: nn.Module) -> list[dict]:
        return parameter_groups(model, self.settings.lr, self.settings.ssm_lr_factor, self.settings.weight_decay)

    @property
    def policy(self) -> Policy:
        return compressm.Energy(tau=self.settings.tau)

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, Tensor]:
        x, y = self.batches[step]
        scores = model(x)
        return cross_entropy(scores, y), (scores.argmax(-1) == y).sum()

    def from_tally(self, tally: float, steps: int) -> float:
        return tally / (steps * self.settings.batch_size)

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        accuracy, loss = evaluate(model, self.data.test_x, self.data.test_y, EVALUATION_BATCH)
        return {"accuracy": accuracy, "loss": loss}

    def result(self, model: nn.Module, last: dict[str, float]) -> dict[str, Any]:
        return last  # of the same split

    def kernel_plan(self) -> KernelPlan:
        N, H = self.settings.d_state, self.settings.d_model
        shapes = {"u": (self.settings.batch_size, self.data.train_x.shape[1], H), "B": (N, H), "C": (H, N)}
        return compressm.kernels.plan("lti_scan", shapes, device=self.device)


class TextTask(Task):
    """Which byte comes next, predicted by a Mamba model."""

    metric = BITS_PER_BYTE
    mixer = "mamba"
    notes = (
        "States are counted per channel, as d_state of Mamba is.",
        "Every measured window begins without context: the first bytes of each are the hardest.",
    )

    def load(self, folder: Path | None) -> None:
        settings = self.settings
        self.text = texts.load_text(folder).to(self.device)
        self.batches = texts.WindowBatches(self.text, settings.length, settings.batch_size, settings.seed)
        measured = ("validation", "test")
        self.windows = {split: self.text.windows(split, settings.length, settings.eval_bytes) for split in measured}

    def describe(self) -> dict[str, int | str]:
        return {**self.text.describe(), "test_measured": self.windows["test"][:, 1:].numel()}

    @staticmethod
    def blank_model(settings: Settings, dataset: Mapping[str, Any]) -> LanguageModel:
        return LanguageModel(settings.d_model, [settings.d_state] * settings.blocks)

    def build_model(self, run: str, states: Sequence[int]) -> LanguageModel:
        torch.manual_seed(self.settings.seed)
        return LanguageModel(self.settings.d_model, states).to(self.device)

    def parameter_groups(self, model: nn.Module) -> list[dict]:
        return language_groups(model, self.settings.lr, self.settings.weight_decay)

    @property
    def policy(self) -> Policy:
        return compressm.FixedRank(self.settings.rank)

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, Tensor]:
        loss = prediction_loss(model, self.batches[step])
        return loss, loss.detach()

    def from_tally(self, tally: float, steps: int) -> float:
        return tally / steps / NATS_PER_BIT

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        return _qualities(evaluate_windows(model, self.windows[split], self.settings.batch_size))

    def result(self, model: nn.Module, last: dict[str, float]) -> dict[str, Any]:
        nats = evaluate_windows(model, self.windows["test"], self.settings.batch_size)
        return {**_qualities(nats), "window_bits": [round(bits, 5) for bits in (nats / NATS_PER_BIT).tolist()]}

    def kernel_plan(self) -> KernelPlan:
        inner = EXPAND * self.settings.d_model
        shapes = {"u": (self.settings.batch_size, inner, self.settings.length), "A": (inner, self.settings.d_state)}
        return compressm.kernels.plan("selective_scan", shapes, device=self.device)


def _qualities(nats: Tensor) -> dict[str, float]:
    """From the nats per byte of every window, (n,)."""
    mean = float(nats.mean())
    return {"bits_per_byte": mean / NATS_PER_BIT, "loss": mean, "perplexity": math.exp(min(mean, 700.0))}


TASK_CLASSES: dict[str, type[Task]] = {"images": ImageTask, "text": TextTask}


def make_task(settings: Settings, folder: Path | None, device: torch.device) -> Task:
    """The task of the settings, its data loaded.

    Raises:
        DataError, ConfigError: see :class:`Task`.
    """
    return TASK_CLASSES[settings.task](settings, folder, device)
