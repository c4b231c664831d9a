"""Which class a sequence belongs to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compressm.experiments.tasks.batches import Batches
from compressm.experiments.tasks.datasets.sequences import Sequences
from compressm.experiments.tasks.metrics import ACCURACY
from compressm.experiments.tasks.parts import Batch, Objective, Outcome
from compressm.experiments.tasks.settings import Settings
from compressm.kernels.fused_cpu import cross_entropy

EVALUATION_BATCH = 250


class Classification(Objective):
    """Cross-entropy of class scores (batch, classes), judged by accuracy on the test set."""

    name = "classification"
    reads = Sequences
    metric = ACCURACY

    def __init__(self, settings: Settings, data: Sequences) -> None:
        super().__init__(settings, data)
        self.batches = Batches(data.train_x, data.train_y, settings.batch_size, settings.seed)
        self.length = data.train_x.shape[1]

    def outcome(self, model: nn.Module, batch: Batch) -> Outcome:
        x, y = batch
        scores = model(x)
        return Outcome(batch, scores, cross_entropy(scores, y), (scores.argmax(-1) == y).sum())

    def from_tally(self, tally: float, steps: int) -> float:
        return tally / (steps * self.settings.batch_size)

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        accuracy, loss = evaluate(model, self.data.test_x, self.data.test_y, EVALUATION_BATCH)
        return {"accuracy": accuracy, "loss": loss}


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> tuple[float, float]:
    """Accuracy and mean cross-entropy in eval mode; the training flag is put back.

    Labels (n,) for scores (n, classes), or (n, L) for scores (n, L, classes); negative ones are not counted.
    """
    was_training = model.training
    model.eval()
    right, loss = 0, 0.0
    for start in range(0, len(y), batch_size):
        scores, labels = model(x[start : start + batch_size]).flatten(0, -2), y[start : start + batch_size].flatten()
        right += int((scores.argmax(-1) == labels).sum())
        loss += float(nn.functional.cross_entropy(scores, labels, reduction="sum"))
    model.train(was_training)
    count = int((y >= 0).sum())
    return right / count, loss / count
