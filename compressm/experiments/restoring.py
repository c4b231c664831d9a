"""A model back from the checkpoint of a training command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressm.compression import load
from compressm.compression.saving.checkpoint import read
from compressm.errors import CheckpointError
from compressm.experiments.methods import METHODS
from compressm.experiments.settings import read_settings
from compressm.experiments.tasks.datasets import DATASETS
from compressm.experiments.tasks.models import MODELS
from compressm.experiments.tasks.task import make_task


def restore_model(path: Path, data_dir: Path | None = None) -> tuple[nn.Module, list[Tensor] | None]:
    """The model in a checkpoint, and calibration batches for it if its data are at hand or their folder is given.

    Raises:
        CheckpointError: not a checkpoint of ``compressm train``.
        DataError: the data cannot be read.
    """
    manifest, _ = read(path)
    extra: Any = manifest.get("extra")
    try:
        settings = read_settings(extra["settings"])
        replaced = METHODS[extra["run"]].replaced(settings)
        model = MODELS[settings.model](settings.model_copy(update=replaced)).blank(extra["dataset"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: was not written by compressm train ({type(error).__name__}: {error})") from error
    load(path, model)
    if data_dir is None and not DATASETS[settings.dataset].at_hand:
        return model, None
    return model, make_task(settings, data_dir, torch.device("cpu")).calibration()
