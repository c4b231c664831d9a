"""What belongs to the places of a sequence that ask for something."""

from __future__ import annotations

from pydantic import Field
from torch import nn

from compressm.experiments.tasks.batches import HELD_OUT, DrawnBatches, stream
from compressm.experiments.tasks.datasets.drawn import Drawn
from compressm.experiments.tasks.metrics import ACCURACY
from compressm.experiments.tasks.objectives.classification import EVALUATION_BATCH, evaluate
from compressm.experiments.tasks.parts import Batch, Objective, Outcome
from compressm.experiments.tasks.settings import Settings
from compressm.kernels.fused_cpu import cross_entropy


class AnswersSettings(Settings):
    """``test_sequences`` is the number of sequences of an evaluation, the same for all seeds."""

    test_sequences: int = Field(512, ge=1)


class Answers(Objective):
    """Cross-entropy of the scores (batch, L, vocabulary) at the places that have an answer, judged by accuracy on sequences
    that no seed trains on.
    """

    name = "answers"
    Settings = AnswersSettings
    settings: AnswersSettings
    reads = Drawn
    metric = ACCURACY
    notes = ("Accuracy and loss count the places of a sequence that have an answer.",)

    def __init__(self, settings: AnswersSettings, data: Drawn) -> None:
        super().__init__(settings, data)
        self.length = data.length
        self.batches = DrawnBatches(data, settings.batch_size, settings.seed)
        self.test = data.draw(self.settings.test_sequences, stream(0, HELD_OUT))

    def describe(self) -> dict[str, int | str]:
        return {"test": len(self.test[0])}

    def outcome(self, model: nn.Module, batch: Batch) -> Outcome:
        tokens, answers = batch
        scores = model(tokens)
        return Outcome(batch, scores, cross_entropy(scores, answers), (scores.argmax(-1) == answers).sum())

    def from_tally(self, tally: float, steps: int) -> float:
        return tally / (steps * self.settings.batch_size * self.data.asked)

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        accuracy, loss = evaluate(model, *self.test, EVALUATION_BATCH)
        return {"accuracy": accuracy, "loss": loss}
