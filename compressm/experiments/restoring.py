"""A model back from the checkpoint of a training command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressm.compression import load
from compressm.compression.checkpoint import read
from compressm.errors import CheckpointError
from compressm.experiments.settings import Settings
from compressm.experiments.tasks import TASK_CLASSES, make_task

AT_HAND = {"digits", "stdlib"}  # datasets that need neither a folder nor a download


def restore_model(path: Path, data_dir: Path | None = None) -> tuple[nn.Module, list[Tensor] | None]:
    """The model in a checkpoint, and calibration batches for it if its data are at hand or their folder is given.

    Raises:
        CheckpointError: not a checkpoint of ``compressm train``.
        DataError: the data cannot be read.
    """
    manifest, _ = read(path)
    extra: Any = manifest.get("extra")
    try:
        settings = Settings.model_validate(extra["settings"])
        model = TASK_CLASSES[settings.task].blank_model(settings, extra["dataset"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: was not written by compressm train ({type(error).__name__}: {error})") from error
    load(path, model)
    if data_dir is None and settings.dataset not in AT_HAND:
        return model, None
    return model, make_task(settings, data_dir, torch.device("cpu")).calibration()
