"""A task: a dataset, a model and an objective, with the data in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressm.experiments.tasks.datasets import DATASETS
from compressm.experiments.tasks.models import MODELS
from compressm.experiments.tasks.objectives import OBJECTIVES
from compressm.experiments.tasks.parts import BlockModel, Data
from compressm.experiments.tasks.settings import Settings


class Task:
    """What all runs of a command have in common.

    Args:
        settings: of the whole command.
        data: of the kind that its dataset gives.
        device: that trains.

    Raises:
        DataError, ConfigError: the data are too few.
    """

    def __init__(self, settings: Settings, data: Data, device: torch.device) -> None:
        self.settings: Any = settings  # with the keys of its parts and of all methods
        self.device, self.data = device, data.to(device)
        self.model = MODELS[settings.model](settings)
        self.objective = OBJECTIVES[settings.objective](settings, self.data)

    @property
    def notes(self) -> tuple[str, ...]:
        """For the reader of the report."""
        return (*self.model.notes, *self.objective.notes)

    def describe(self) -> dict[str, int | str]:
        """The data, for the report."""
        return {**self.data.describe(), **self.objective.describe()}

    def build_model(self, states: Sequence[int], **replaced: Any) -> BlockModel:
        """The model with the seed's initial parameters.

        Args:
            states: of every block.
            replaced: settings of the model that others replace.
        """
        model = type(self.model)(self.settings.model_copy(update=replaced))
        torch.manual_seed(self.settings.seed)
        return model.build(self.data, states).to(self.device)

    def calibration(self) -> list[Tensor]:
        """Batches of training inputs for data Gramians, the same at every call."""
        return self.objective.batches.calibration(self.settings.calibration_sequences)


def make_task(settings: Settings, folder: Path | None, device: torch.device) -> Task:
    """The task of the settings, its data loaded.

    Args:
        settings: of the whole command.
        folder: of the data files; None takes the usual source.
        device: that trains.

    Raises:
        DataError, ConfigError: the data cannot be read, or are too few.
    """
    return Task(settings, DATASETS[settings.dataset](settings).load(folder), device)
