"""The Hankel singular values of a model's layers as they are, as a part of a loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressm.control import hankel_nuclear_norm

if TYPE_CHECKING:
    from compressm.experiments.training import TrainingRun
    from compressm.layers import LRU


def hankel_norms(run: TrainingRun) -> Tensor:
    """The sum over the layers of a run's model, float64."""
    return torch.stack([hankel_norm(getattr(block, run.task.model.mixer)) for block in run.model.blocks]).sum()


def hankel_norm(layer: LRU) -> Tensor:
    """The sum of a layer's Hankel singular values, differentiable in its parameters."""
    log_lam = torch.complex(-layer.nu_log.double().exp(), layer.theta_log.double().exp())
    B = layer.gamma_log.double().exp()[:, None] * torch.complex(layer.B_re.double(), layer.B_im.double())
    return hankel_nuclear_norm(log_lam, B, torch.complex(layer.C_re.double(), layer.C_im.double()))
