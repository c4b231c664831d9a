"""Which byte comes next."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from compressm.experiments.tasks.batches import WindowBatches
from compressm.experiments.tasks.datasets.texts import Text
from compressm.experiments.tasks.metrics import BITS_PER_BYTE
from compressm.experiments.tasks.parts import Batch, Objective, Outcome
from compressm.experiments.tasks.settings import Settings
from compressm.kernels.fused_cpu import cross_entropy

NATS_PER_BIT = math.log(2)


class NextByteSettings(Settings):
    """``length`` is the number of bytes that an example predicts, ``eval_bytes`` that of an evaluation."""

    length: int = Field(256, ge=1)
    eval_bytes: int = Field(2**17, ge=1)


class NextByte(Objective):
    """Cross-entropy of the scores (batch, L, 256) of the byte behind each, judged by bits per byte on the validation set."""

    name = "next_byte"
    Settings = NextByteSettings
    settings: NextByteSettings
    reads = Text
    metric = BITS_PER_BYTE
    notes = ("Every measured window begins without context: the first bytes of each are the hardest.",)

    def __init__(self, settings: NextByteSettings, data: Text) -> None:
        super().__init__(settings, data)
        self.length = settings.length
        self.batches = WindowBatches(data, settings.length, settings.batch_size, settings.seed)
        measured = ("validation", "test")
        self.windows = {split: data.windows(split, settings.length, settings.eval_bytes) for split in measured}

    def describe(self) -> dict[str, int | str]:
        return {"test_measured": self.windows["test"][:, 1:].numel()}

    def outcome(self, model: nn.Module, batch: Batch) -> Outcome:
        (windows,) = batch
        scores, loss = predict(model, windows)
        return Outcome(batch, scores, loss, loss.detach())

    def from_tally(self, tally: float, steps: int) -> float:
        return tally / steps / NATS_PER_BIT

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        return _qualities(evaluate_windows(model, self.windows[split], self.settings.batch_size))

    def result(self, model: nn.Module, last: dict[str, float]) -> dict[str, Any]:
        nats = evaluate_windows(model, self.windows["test"], self.settings.batch_size)
        return {**_qualities(nats), "window_bits": [round(bits, 5) for bits in (nats / NATS_PER_BIT).tolist()]}


def _qualities(nats: Tensor) -> dict[str, float]:
    """From the nats per byte of every window, (n,)."""
    mean = float(nats.mean())
    return {"bits_per_byte": mean / NATS_PER_BIT, "loss": mean, "perplexity": math.exp(min(mean, 700.0))}


def predict(model: nn.Module, windows: Tensor, reduction: str = "mean") -> tuple[Tensor, Tensor]:
    """Scores (n, L, 256) of every byte but the first of windows (n, L + 1), and their cross-entropy in nats: its mean, or with
    ``"none"`` (n, L).
    """
    scores = model(windows[:, :-1])
    return scores, cross_entropy(scores, windows[:, 1:].long(), reduction=reduction)


@torch.no_grad()
def evaluate_windows(model: nn.Module, windows: Tensor, batch_size: int) -> Tensor:
    """Mean cross-entropy in nats per predicted byte of every window (n,), float64, in eval mode; the flag is put back."""
    was_training = model.training
    model.eval()
    parts = [predict(model, part, "none")[1].double().mean(1) for part in windows.split(batch_size)]
    model.train(was_training)
    return torch.cat(parts)
