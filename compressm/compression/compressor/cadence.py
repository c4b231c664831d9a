"""Whether Compressor.step() is called in step with the optimizer; complains where schedules would run late or early."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch

from compressm.compression.planning.schedules import Schedule, ScheduleWarning
from compressm.compression.surgery.audit import Optimizers
from compressm.compression.surgery.optimizer_state import unwrapped

RHYTHM = 8  # so many optimizer steps in a row, each with the same fault
SILENCE = 64  # so many calls without any optimizer step; a GradScaler that looks for its scale skips far fewer


class Cadence:
    """Counts optimizer steps between calls of :meth:`call`; each kind of complaint is made once.

    One call per optimizer step is expected.  A call without a step is normal now and then: a GradScaler skips steps whose
    gradients overflow, several in a row at the beginning.  What no scaler does is a rhythm: in gradient accumulation every
    step follows calls without one.

    Args:
        schedule: of the Compressor.
        optimizers: that it was given.
    """

    def __init__(self, schedule: Schedule, optimizers: Optimizers) -> None:
        self.schedule, self.optimizers = schedule, optimizers
        self.told: set[str] = set()
        self.restart(0)
        own = weakref.ref(self)
        self.handles = [unwrapped(o).register_step_post_hook(_counter(own, index)) for index, o in enumerate(optimizers)]

    def restart(self, step: int) -> None:
        """Count anew from a Compressor at ``step``."""
        self.first, self.calls = step, 0
        self.taken = [0] * len(self.optimizers)
        self.idle = self.early = self.late = 0
        self.versions: list[int] = []

    def close(self) -> None:
        """Stop counting."""
        for handle in self.handles:
            handle.remove()

    def took(self, index: int) -> None:
        """An optimizer took a step."""
        self.taken[index] += 1
        if self.calls == 0 and index == 0:
            self._check_never_called()

    def call(self) -> None:
        """The Compressor was called."""
        self.calls += 1
        steps = min((count for count in self.taken if count), default=0)
        self.taken = [0] * len(self.taken)
        if steps == 0:
            self.idle += 1
            if self.idle == 1:
                self.versions = self._versions()
            if self.idle == SILENCE and self.versions == self._versions():
                self._tell(
                    "silent",
                    f"Compressor.step() was called {SILENCE} times while the optimizer that it was given took no step. Give it "
                    "the optimizer that trains the model, and call it once after every optimizer.step()",
                )
            return
        self.early = self.early + 1 if self.idle and self.calls > 1 else 0
        self.late = self.late + 1 if steps > 1 and self.calls > 1 else 0
        if self.early == RHYTHM:
            self._tell(
                "early",
                f"Compressor.step() is called {self.idle + 1} times per optimizer step: reductions come too early. Call it "
                "once after every optimizer.step(), in gradient accumulation not after every micro-batch",
            )
        if self.late == RHYTHM:
            self._tell(
                "late",
                f"the optimizer takes {steps} steps per call of Compressor.step(): reductions come too late. Call it once "
                "after every optimizer.step()",
            )
        self.idle = 0

    def _check_never_called(self) -> None:
        due = self.schedule.after(self.first)
        if due is not None and self.taken[0] == due - self.first + 1:
            self._tell(
                "never",
                f"the optimizer has taken {self.taken[0]} steps but Compressor.step() was never called; the reduction due at "
                f"step {due} has not happened. Call compressor.step() after optimizer.step()",
            )

    def _tell(self, kind: str, message: str) -> None:
        if kind not in self.told:
            self.told.add(kind)
            warnings.warn(message, ScheduleWarning, stacklevel=5)

    def _versions(self) -> list[int]:
        """Changes whenever a parameter does, also by a step that the hooks do not see (a compiled one)."""
        return [p._version for o in self.optimizers for group in o.param_groups for p in group["params"]]


def _counter(own: weakref.ref[Cadence], index: int) -> Callable[..., None]:
    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        cadence = own()
        if cadence is not None:
            cadence.took(index)

    return hook
