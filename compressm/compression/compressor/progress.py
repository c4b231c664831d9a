"""The progress of a Compressor, as saved in its ``state_dict``, and the checks of one that is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from compressm.compression.common.types import fits, is_number
from compressm.compression.planning.report import ReductionReport, report_from_dict
from compressm.compression.planning.stability import parsed
from compressm.errors import bad_argument

STATE_FORMAT = 1
STATE_TYPES = {
    "format": int, "recipe": str, "step": int, "attempts": int, "kept": dict[str, float], "ranks": dict[str, int],
    "history": list[dict],
}  # fmt: skip


@dataclass
class Progress:
    """How far a Compressor is, which a rollback sets back.

    Attributes:
        step: optimizer steps.
        attempts: reductions that were attempted.
        reduced: those of them that removed states.
        kept: by layer, how much of the sum of its spectra all of them have kept.
        memory: of an adaptive schedule.
        waiting: whether an attempt came due that has not been made.
    """

    step: int = 0
    attempts: int = 0
    reduced: int = 0
    kept: dict[str, float] = field(default_factory=dict)
    memory: Any = None
    waiting: bool = False

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Progress:
        """From checked state of a Compressor; whatever else is in there is left."""
        step, attempts, reduced = (int(state.get(name, 0)) for name in ("step", "attempts", "reduced"))
        kept = {name: float(kept) for name, kept in state["kept"].items()}
        return cls(step, attempts, reduced, kept, state.get("memory"), bool(state.get("waiting", False)))

    def next_of(self, attempts: int) -> str:
        """The next attempt in words, of so many that are scheduled."""
        return f"attempt {self.attempts + 1}" + (f" of {attempts}" if self.attempts < attempts else "")

    def add(self, report: ReductionReport) -> None:
        """Count an attempt."""
        self.attempts += 1
        self.reduced += report.changed
        for layer in report.layers:
            self.kept[layer.name] *= 1 - layer.discarded

    def shares(self, budget: float, attempts: int) -> dict[str, float]:
        """Per layer, the fraction that the next of some attempts must keep: an equal share of what is left of the budget."""
        remaining = max(1, attempts - self.attempts)
        return {name: min(1.0, budget / kept) ** (1 / remaining) for name, kept in self.kept.items()}


def check_state(state: Any, recipe: str, layers: Collection[str]) -> None:
    """Raise ArgumentError unless ``state`` is of a Compressor of this recipe and these layers, its guard's part apart."""
    if not isinstance(state, Mapping) or (missing := sorted(STATE_TYPES.keys() - state.keys())):
        got = f"without {', '.join(missing)}" if isinstance(state, Mapping) else type(state).__name__
        raise bad_argument("state_dict", got=got, expected="what Compressor.state_dict() returned")
    for key, hint in STATE_TYPES.items():
        if not fits(state[key], hint):
            raise bad_argument(f"state_dict {key}", got=f"{state[key]!r:.80}", expected=f"a value of type {hint}")
    if min(state["step"], state["attempts"]) < 0 or not all(0 < kept <= 1 for kept in state["kept"].values()):
        got = f"step {state['step']}, attempts {state['attempts']}, kept {state['kept']}"
        raise bad_argument("state_dict", got=got, expected="counts, and fractions in (0, 1]")
    if state["format"] != STATE_FORMAT:
        raise bad_argument("state_dict format", got=state["format"], expected=str(STATE_FORMAT))
    if state["recipe"] != recipe:
        raise bad_argument("recipe", got=recipe, expected=f"{state['recipe']!r}, as in the saved run")
    if set(state["kept"]) != set(layers) or set(state["ranks"]) != set(layers):
        got, expected = f"layers {sorted(state['ranks'])}", f"layers {sorted(layers)}"
        raise bad_argument("state_dict", got=got, expected=expected)
    guard = state.get("guard")
    if guard is not None and (not isinstance(guard, Mapping) or "probation" not in guard):
        raise bad_argument("state_dict guard", got=f"{guard!r:.80}", expected="what Compressor.state_dict() returned")
    for report in state["history"]:
        report_from_dict(report)
    parsed(state.get("seen", []))
    check_progress(state, layers)


def check_progress(progress: Any, layers: Collection[str]) -> None:
    """Raise ArgumentError unless ``progress`` is what a Compressor of these layers says of itself."""
    kept = progress.get("kept") if isinstance(progress, Mapping) else None
    fine = isinstance(kept, Mapping) and set(kept) == set(layers) and all(map(is_number, kept.values()))
    counts = [progress.get("step"), progress.get("attempts"), progress.get("reduced", 0)] if fine else [None]
    remembered = isinstance(progress.get("memory") if fine else None, Mapping | None)
    if not remembered or not all(type(count) is int and count >= 0 for count in counts):
        raise bad_argument("state_dict", got=repr(progress)[:80], expected="what Compressor.state_dict() returned")
