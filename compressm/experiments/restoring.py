"""A model back from the checkpoint of a training command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressm.compression import load
from compressm.compression.checkpoint import read
from compressm.errors import CheckpointError
from compressm.experiments import datasets
from compressm.experiments.batches import Batches
from compressm.experiments.models import Classifier
from compressm.experiments.settings import Settings


def restore_model(path: Path, data_dir: Path | None = None) -> tuple[Classifier, list[Tensor] | None]:
    """The model in a checkpoint, and calibration batches for it if the folder of its data is given (digits need none).

    Raises:
        CheckpointError: not a checkpoint of ``compressm train``.
        DataError: the data cannot be read.
    """
    manifest, _ = read(path)
    extra: Any = manifest.get("extra")
    try:
        settings = Settings.model_validate(extra["settings"])
        channels, classes = int(extra["dataset"]["channels"]), int(extra["dataset"]["classes"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: was not written by compressm train ({type(error).__name__}: {error})") from error
    states = [settings.d_state] * settings.blocks
    blank = torch.zeros(channels)
    model = Classifier(channels, classes, settings.d_model, states, mean=blank, std=blank, dropout=settings.dropout)
    load(path, model)
    if data_dir is None and settings.dataset != "digits":
        return model, None
    data = datasets.load(settings.dataset, data_dir)
    batches = Batches(data.train_x, data.train_y, settings.batch_size, settings.seed)
    return model, batches.calibration(settings.calibration_sequences)
