"""The three parts of a task: a dataset, a model, an objective.

Each part is a class with a ``name``, registered in ``DATASETS``, ``MODELS`` or ``OBJECTIVES``, and made with the settings of
the command, of which those in its ``Settings`` are its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from compressm.compression import Policy
from compressm.control import Criterion
from compressm.errors import DataError
from compressm.experiments.tasks.metrics import Metric
from compressm.experiments.tasks.settings import BlockSettings, Settings, SettingsClass
from compressm.kernels import KernelPlan

Batch = tuple[Tensor, ...]  # along the first axis of each the examples


class Data(ABC):
    """What a dataset holds, in memory.

    Attributes:
        kind: in words: models and objectives go with one kind.
        name: for reports.
    """

    kind: ClassVar[str]
    name: str

    @abstractmethod
    def to(self, device: torch.device) -> Data:
        """The same on a device."""

    @abstractmethod
    def describe(self) -> dict[str, int | str]:
        """For the report, and to tell whether a checkpoint was trained on other data."""

    def held_out(self) -> Data:
        """The same with a part held out of training in the place of its test part, for choices that must not see that.

        Raises:
            DataError: there is no such part.
        """
        raise DataError(f"--tune: {self.kind} have no part to tune on (no {type(self).__name__}.held_out). Leave --tune out")


class Part:
    """A part of a task.

    Args:
        settings: of the whole command.
    """

    name: ClassVar[str]
    Settings: ClassVar[SettingsClass] = Settings
    settings: Any  # an instance of Settings: each part says of which

    def __init__(self, settings: Any) -> None:
        self.settings = settings


class Dataset(Part, ABC):
    """Where data come from.

    Attributes:
        gives: the kind of data.
        model, objective: which go with it where the settings name none.
        at_hand: whether it needs neither a folder nor a download.
        examples: to train on from the usual source, where that is one number; None where it is not, or a setting ``sequences``.
    """

    gives: ClassVar[type[Data]]
    model: ClassVar[str]
    objective: ClassVar[str]
    at_hand: ClassVar[bool] = False
    examples: ClassVar[int | None] = None

    @abstractmethod
    def load(self, folder: Path | None) -> Data:
        """Read the data.

        Args:
            folder: where the files are; None takes the usual source.

        Raises:
            DataError: missing, incomplete or damaged files, or a failed download.
        """


class BlockModel(nn.Module):
    """What a task's model is, or looks like.

    Attributes:
        blocks: one after the other.
        mixer: the attribute of a block that is its state-space layer.
    """

    blocks: nn.ModuleList
    mixer: str

    @property
    def states(self) -> list[int]:
        """States of every block now."""
        return [getattr(block, self.mixer).d_state for block in self.blocks]


@dataclass(frozen=True)
class Cut:
    """How a model is made smaller; the arguments of :class:`compressm.Compressor`.

    Attributes:
        policy: how many states a reduction leaves.
        attempts: reductions, spread evenly over the time that a method gives them.
        recipe, multiple_of, form: see there.
        data_free: whether the Gramians are those of the parameters alone, as in the paper's recipe, and not measured.
    """

    policy: Policy
    attempts: int = 1
    recipe: str = "default"
    multiple_of: int = 1
    form: str = "auto"
    data_free: bool = False

    @property
    def measured(self) -> bool:
        """Whether the reduction is calibrated on data."""
        return not self.data_free and self.recipe != "paper"


class Model(Part, ABC):
    """A family of models.

    Attributes:
        reads: the kind of data.
        mixer: the attribute of a block that is its state-space layer.
        criteria: the kind of criteria that can choose among its states.
        notes: for the reader of the report.
    """

    Settings: ClassVar[SettingsClass] = BlockSettings
    reads: ClassVar[type[Data]]
    mixer: ClassVar[str]
    criteria: ClassVar[type] = Criterion
    notes: ClassVar[tuple[str, ...]] = ()

    def full_states(self) -> list[int]:
        """The number of states of every block at full size."""
        return [self.settings.d_state] * self.settings.blocks

    @abstractmethod
    def small_states(self) -> list[int] | None:
        """Of every block after a reduction; None where only the reduction will tell."""

    @abstractmethod
    def build(self, data: Any, states: Sequence[int]) -> BlockModel:
        """A model for the data with random initial parameters; ``states`` of every block."""

    @abstractmethod
    def blank(self, facts: Mapping[str, Any]) -> BlockModel:
        """A model of full size whose parameters and buffers a checkpoint is loaded into; ``facts`` as :meth:`Data.describe`."""

    @abstractmethod
    def parameter_groups(self, model: nn.Module) -> list[dict]:
        """For AdamW."""

    @property
    @abstractmethod
    def cut(self) -> Cut:
        """How a reduction makes it smaller."""

    @abstractmethod
    def kernel_plan(self, length: int, device: torch.device) -> KernelPlan:
        """What a layer of full size runs in training on sequences of that length; builds the C++ kernels if need be."""

    def check(self, *, reduced: bool) -> None:
        """Raise ValueError where settings contradict each other; ``reduced``: whether a run ends smaller than full size."""


class Source(Protocol):
    """The batches of training, a function of the step alone."""

    def __getitem__(self, step: int) -> Batch:
        """Of a step, counted from 0."""

    def calibration(self, sequences: int) -> list[Tensor]:
        """Batches of inputs for data Gramians, the same at every call."""


@dataclass
class Outcome:
    """What the forward of a training step found.

    Attributes:
        batch: that the model saw.
        scores: that it answered.
        loss: of the objective, to be minimised.
        tally: of the batch for the metric: a float32 or integer scalar.
    """

    batch: Batch
    scores: Tensor
    loss: Tensor
    tally: Tensor


class Objective(Part, ABC):
    """What a model is trained for, and judged by.

    Attributes:
        reads: the kind of data.
        metric: what it is judged by.
        notes: for the reader of the report.
        batches: of training.
        length: of a training sequence.

    Args:
        settings: of the whole command.
        data: on the device that trains.

    Raises:
        DataError, ConfigError: the data are too few.
    """

    reads: ClassVar[type[Data]]
    metric: ClassVar[Metric]
    notes: ClassVar[tuple[str, ...]] = ()
    batches: Source
    length: int

    def __init__(self, settings: Any, data: Any) -> None:
        super().__init__(settings)
        self.data = data

    @abstractmethod
    def outcome(self, model: nn.Module, batch: Batch) -> Outcome:
        """The forward of a training step.

        Tallies are summed in float64, exactly, so that a curve does not depend on where a run was interrupted.
        """

    @abstractmethod
    def from_tally(self, tally: float, steps: int) -> float:
        """The metric on the batches of some steps from the sum of their tallies."""

    @abstractmethod
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """The metric under its key, the ``loss`` and what else belongs to them, on ``"test"`` or what the metric watches."""

    def imitation(self, scores: Tensor, taught: Tensor, temperature: float) -> Tensor:
        """The loss of a student's scores of classes, along the last axis, beside those of its teacher.

        Cross-entropy of the two distributions at a temperature, times its square, so that gradients keep their size (Hinton,
        Vinyals and Dean, arXiv 1503.02531).
        """
        soft = (taught / temperature).softmax(-1)
        return -(temperature**2) * (soft * (scores / temperature).log_softmax(-1)).sum(-1).mean()

    def result(self, model: nn.Module, last: dict[str, float]) -> dict[str, Any]:
        """What a run ends with, on ``"test"``; ``last`` is its last evaluation, which is the answer where it watches that."""
        return last if self.metric.watched == "test" else self.evaluate(model, "test")

    def describe(self) -> dict[str, int | str]:
        """What it adds to the description of the data."""
        return {}
