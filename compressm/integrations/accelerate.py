"""accelerate: a Compressor for a prepared model, in ``save_state`` and ``load_state``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from compressm.compression import Compressor
from compressm.compression.common.models import plain_model
from compressm.compression.surgery.optimizer_state import unwrapped
from compressm.errors import needs_extra
from compressm.integrations._common import sized_configs, tell_configs
from compressm.integrations.resizing import resize_on_load

with needs_extra("compressm.integrations.accelerate"):
    from accelerate import Accelerator

__all__ = ["prepare"]


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    **options: Any,
) -> Compressor:
    """A :class:`~compressm.Compressor` for what ``accelerator.prepare`` returned.

    It is registered for checkpointing: ``accelerator.save_state`` stores it, and ``accelerator.load_state`` into models of the
    original size resizes their layers first and resumes in mid-schedule.  Transformers' models with one ``state_size`` keep
    the same number of states in all layers, unless ``uniform=False``; after a reduction call
    ``compressm.integrations.transformers.update_config``.  Count optimizer steps, not micro-batches::

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        compressor = compressm.integrations.accelerate.prepare(accelerator, model, optimizer, policy=..., schedule=...)
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                compressor.step()

    Args:
        accelerator: that of the training.
        model: prepared.
        optimizer: prepared, or several.
        options: of the Compressor: ``policy``, ``schedule``, ``calibration`` and so on.

    Returns:
        the Compressor, on the model and the optimizers behind accelerate's wrappers.

    Raises:
        ModelError: the model was wrapped for distributed training.
        ArgumentError, OptimizerError: see the Compressor.
    """
    plain = plain_model(model)
    items: Any = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    optimizers = [unwrapped(item) for item in items]
    compressor = Compressor(plain, optimizers, **{"uniform": bool(sized_configs(plain))} | options)
    accelerator.register_for_checkpointing(compressor)
    resize_on_load(plain, lambda: optimizers, after=lambda: tell_configs(plain))
    return compressor
