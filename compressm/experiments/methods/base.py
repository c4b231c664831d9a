"""What a method is: one way to come to a trained model, with what it starts from, adds to the loss, and cuts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from compressm.errors import bad_argument
from compressm.experiments.tasks.rates import Rate, learning_rate
from compressm.experiments.tasks.settings import Settings, SettingsClass

if TYPE_CHECKING:
    from torch import Tensor

    from compressm.compression import Compressor
    from compressm.experiments.tasks.parts import BlockModel, Model, Outcome
    from compressm.experiments.tasks.task import Task
    from compressm.experiments.training import TrainingRun


@dataclass(frozen=True)
class Look:
    """How a method is drawn, the same in every picture and table of the report.

    Attributes:
        colour, dark: ``#rrggbb`` on a light and on a dark page; they should differ for colour-blind eyes too.
        line: matplotlib's style of the line.
        marker: of measured points.
        width: of the line, in points.
        layer: place from back to front; built-in methods lie from 2 to 3.5.
    """

    colour: str
    dark: str
    line: str | tuple[float, tuple[float, ...]] = "-"
    marker: str = "o"
    width: float = 1.5
    layer: float = 2.2

    def __post_init__(self) -> None:
        for key in ("colour", "dark"):
            if not re.fullmatch("#[0-9a-f]{6}", getattr(self, key)):
                raise bad_argument(key, got=repr(getattr(self, key)), expected="a colour like '#0072b2', in lower case")


UNKNOWN = Look("#a0478a", "#dd8fc0")  # of a run whose method is not registered


class State(Protocol):
    """What a method keeps during one run, beside the model; checkpoints hold it."""

    def state_dict(self) -> dict[str, Any]:
        """A JSON tree with tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave."""


class Method:
    """One way to come to a trained model.  An instance serves all runs of a process and keeps nothing of any of them.

    Attributes:
        name: of its runs, in ``--set runs=[...]``, reports and names of checkpoints.
        title: for people.
        phrase: how a sentence calls its run.
        look: how it is drawn.
        Settings: with the keys of its own.
        reference: whether the others are compared with it.
        reduced: whether its model ends smaller than full size.
        shrinks: whether it does so in training: a report is about the first run that does.
        teachers: the methods whose training a run of its own costs as well.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    phrase: ClassVar[str]
    look: ClassVar[Look] = UNKNOWN
    Settings: ClassVar[SettingsClass] = Settings
    reference: ClassVar[bool] = False
    reduced: ClassVar[bool] = False
    shrinks: ClassVar[bool] = False
    teachers: ClassVar[tuple[str, ...]] = ()

    def unfit(self, model: type[Model]) -> str:
        """Why it cannot be used with a family of models, such as ``changes initial phases, mamba has none``; else empty."""
        return ""

    def check(self, settings: Any, model: Model) -> None:
        """Raise ValueError where the settings of a command that runs it contradict each other."""

    def needs(self, settings: Any, model: Model) -> tuple[str, ...]:
        """The methods whose runs must be finished before it begins, as it takes over something of theirs."""
        return self.teachers

    def rate(self, settings: Any) -> Rate:
        """Factor on the peak learning rate by step."""
        return learning_rate(settings)

    def states(self, task: Task, finished: Sequence[TrainingRun]) -> list[int]:
        """Of every block at the start; ``finished`` are the runs before this one."""
        return task.model.full_states()

    def replaced(self, settings: Any) -> dict[str, Any]:
        """Settings of the model that are others for this method, for another initialisation or size."""
        return {}

    def start(self, task: Task, states: Sequence[int]) -> BlockModel:
        """The model at the start, with that many states in every block."""
        return task.build_model(states, **self.replaced(task.settings))

    def state(self, run: TrainingRun, finished: Sequence[TrainingRun]) -> State | None:
        """What it keeps during a run, made at its start: another model, averages."""
        return None

    def compressor(self, run: TrainingRun) -> Compressor | None:
        """Of the run's model and optimizer."""
        return None

    def loss(self, run: TrainingRun, outcome: Outcome) -> Tensor | None:
        """What is added to the objective's loss in a step; curves show that of the objective alone."""
        return None
