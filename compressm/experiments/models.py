"""The LRU classifier: encoder, blocks, mean over time, decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compressm.kernels import gelu_dropout, linear_glu_dropout_add
from compressm.layers import LRU, LayerNorm


class SequenceBlock(nn.Module):
    """x + dropout(GLU(dropout(GELU(LRU(norm(x)))))), the residual block of the LRU paper (section 4).

    Args:
        d_model: channels H.
        d_state: states N of the LRU.
        dropout: probability, elementwise.
        r_min, r_max, max_phase: initial eigenvalues, see :class:`compressm.layers.LRU`.
    """

    def __init__(self, d_model: int, d_state: int, dropout: float, r_min: float, r_max: float, max_phase: float) -> None:
        super().__init__()
        self.norm = LayerNorm(d_model)
        self.lru = LRU(d_model, d_state, r_min=r_min, r_max=r_max, max_phase=max_phase)
        self.glu = nn.Linear(d_model, 2 * d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, L, H) -> (batch, L, H)."""
        p, training = self.dropout.p, self.dropout.training
        y = gelu_dropout(self.lru(self.norm(x)), p, training)
        return linear_glu_dropout_add(y, self.glu.weight, self.glu.bias, x, p, training)


class Classifier(nn.Module):
    """Class scores of a sequence of uint8 pixels.

    Args:
        channels, classes: of the data.
        d_model: H.
        d_states: states of every block.
        mean, std: (channels,) of the pixels, kept as buffers.
        dropout, r_min, r_max, max_phase: see :class:`SequenceBlock`.
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
        self.blocks = nn.ModuleList(SequenceBlock(d_model, n, dropout, r_min, r_max, max_phase) for n in d_states)
        self.norm = LayerNorm(d_model)
        self.decoder = nn.Linear(d_model, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (batch, L, channels), any real dtype -> scores (batch, classes)."""
        x = self.encoder((pixels.to(self.mean.dtype) - self.mean) / self.std)
        for block in self.blocks:
            x = block(x)
        return self.decoder(self.norm(x).sum(1) / x.shape[1])  # mean(1) would divide the gradient of every step

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
