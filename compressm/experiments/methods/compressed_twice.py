"""The compressed run that keeps half as many states more at first, and loses these late."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import compressm
from compressm.compression.planning.policies import LayerSpectrum, Policy
from compressm.experiments.methods.base import Look
from compressm.experiments.methods.compressed import CompressedSettings
from compressm.experiments.methods.same_cut import SameCut

if TYPE_CHECKING:
    from compressm.experiments.tasks.parts import Model
    from compressm.experiments.training import TrainingRun

MORE, LATE = 1.5, 0.6  # of the states in the end, and where in the training the second cut is


@dataclass(frozen=True)
class InTwoCuts(Policy):
    """To ``MORE`` times the ranks of another policy from more states than that, else to these ranks.

    Args:
        policy: the other one.
    """

    policy: Policy

    def ranks(self, spectra: Mapping[str, LayerSpectrum]) -> dict[str, int]:
        last = self.policy.ranks(spectra)
        first = {name: math.ceil(MORE * rank) for name, rank in last.items()}
        return {name: first[name] if spectrum.rank > first[name] else last[name] for name, spectrum in spectra.items()}


class CompressedTwice(SameCut):
    """Starts at full size; has half as many states more than the compressed run where that one is cut, and as many late."""

    name = "compressed_twice"
    title = "compressed in two cuts"
    phrase = "the run that was cut a second time late in training"
    look = Look("#3f7f93", "#9fd4e4", line=(0, (5, 1)), marker="v", width=1.8, layer=2.48)

    def check(self, settings: CompressedSettings, model: Model) -> None:
        super().check(settings, model)
        if settings.reduce_until >= LATE:
            raise ValueError(f"reduce_until must be below {LATE}, where the second cut of {self.name} is")

    def schedule(self, settings: CompressedSettings) -> compressm.At:
        return compressm.At([max(1, round(fraction * settings.steps)) for fraction in (settings.reduce_until, LATE)])

    def policy(self, run: TrainingRun) -> InTwoCuts:
        return InTwoCuts(super().policy(run))

    def options(self, run: TrainingRun) -> dict[str, Any]:
        return {"form": run.task.model.cut.form, "calibration": run.task.calibration()}
