"""Which signal belongs to another."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from compressm.experiments.tasks.batches import Batches
from compressm.experiments.tasks.datasets.signals import Signals
from compressm.experiments.tasks.metrics import ERROR_DB
from compressm.experiments.tasks.parts import Batch, Objective, Outcome
from compressm.experiments.tasks.settings import Settings

EVALUATION_BATCH = 64


class Regression(Objective):
    """Mean squared error of the answer (batch, L, outputs), judged by its decibels on the test set."""

    name = "regression"
    reads = Signals
    metric = ERROR_DB
    notes = ("Error: mean square of what the answer misses over that of the signal; ten decibels are a factor of ten.",)

    def __init__(self, settings: Settings, data: Signals) -> None:
        super().__init__(settings, data)
        self.batches = Batches(data.train_x, data.train_y, settings.batch_size, settings.seed)
        self.length = data.train_x.shape[1]

    def outcome(self, model: nn.Module, batch: Batch) -> Outcome:
        x, y = batch
        answer = model(x)
        loss = nn.functional.mse_loss(answer, y)
        return Outcome(batch, answer, loss, loss.detach())

    def imitation(self, scores: Tensor, taught: Tensor, temperature: float) -> Tensor:
        """Mean squared error from the teacher's answer."""
        return nn.functional.mse_loss(scores, taught)

    def from_tally(self, tally: float, steps: int) -> float:
        return decibels(tally / steps)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        was_training = model.training
        model.eval()
        squares, (x, y) = 0.0, (self.data.test_x, self.data.test_y)
        for inputs, outputs in zip(x.split(EVALUATION_BATCH), y.split(EVALUATION_BATCH), strict=True):
            squares += float((model(inputs) - outputs).double().square().sum())
        model.train(was_training)
        mean = squares / y.numel()
        return {"error_db": decibels(mean / float(y.double().square().mean())), "loss": mean}


def decibels(ratio: float) -> float:
    """Of a ratio of powers."""
    return 10 * math.log10(max(ratio, 1e-30)) if math.isfinite(ratio) else ratio
