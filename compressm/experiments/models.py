"""The LRU classifier: encoder, blocks, mean over time, decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compressm.kernels import standardized_linear
from compressm.layers import LayerNorm, LRUBlock


class Classifier(nn.Module):
    """Class scores of a sequence of uint8 pixels.

    Args:
        channels, classes: of the data.
        d_model: H.
        d_states: states of every block.
        mean, std: (channels,) of the pixels, kept as buffers.
        dropout, r_min, r_max, max_phase: see :class:`compressm.layers.LRUBlock`.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        d_model: int,
        d_states: Sequence[int],
        *,
        mean: Tensor,
        std: Tensor,
        dropout: float = 0.0,
        r_min: float = 0.9,
        r_max: float = 0.999,
        max_phase: float = 6.28,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())
        self.encoder = nn.Linear(channels, d_model)
        ring = {"r_min": r_min, "r_max": r_max, "max_phase": max_phase}
        self.blocks = nn.ModuleList(LRUBlock(d_model, n, dropout=dropout, **ring) for n in d_states)
        self.norm = LayerNorm(d_model)
        self.decoder = nn.Linear(d_model, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (batch, L, channels), any real dtype -> scores (batch, classes)."""
        x = standardized_linear(pixels, self.mean, self.std, self.encoder.weight, self.encoder.bias)
        for block in self.blocks:
            x = block(x)
        return self.decoder(self.norm.mean_over_time(x))

    @property
    def states(self) -> list[int]:
        """States of every block now."""
        return [block.lru.d_state for block in self.blocks]


def parameter_groups(model: nn.Module, lr: float, ssm_lr_factor: float, weight_decay: float) -> list[dict]:
    """AdamW groups: the recurrence (nu, theta, gamma, B) with its own rate and no decay, the rest as usual."""
    recurrent = {"nu_log", "theta_log", "gamma_log", "B_re", "B_im"}
    named = list(model.named_parameters())
    ssm = [p for name, p in named if name.rpartition(".")[2] in recurrent]
    rest = [p for name, p in named if name.rpartition(".")[2] not in recurrent]
    return [
        {"params": rest, "lr": lr, "weight_decay": weight_decay},
        {"params": ssm, "lr": lr * ssm_lr_factor, "weight_decay": 0.0},
    ]


def count_parameters(model: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> tuple[float, float]:
    """Accuracy and mean cross-entropy in eval mode; the training flag is put back."""
    was_training = model.training
    model.eval()
    right, loss = 0, 0.0
    for start in range(0, len(y), batch_size):
        scores, labels = model(x[start : start + batch_size]), y[start : start + batch_size]
        right += int((scores.argmax(-1) == labels).sum())
        loss += float(nn.functional.cross_entropy(scores, labels, reduction="sum"))
    model.train(was_training)
    return right / len(y), loss / len(y)
