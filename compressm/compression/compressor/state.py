"""The state of a Compressor, out of it and into another one, and what its processes must agree on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from compressm.compression.common.described import described
from compressm.compression.compressor.progress import STATE_FORMAT, Progress, check_progress, check_state
from compressm.compression.planning.report import report_from_dict
from compressm.compression.planning.stability import Sightings, parsed
from compressm.errors import bad_argument

if TYPE_CHECKING:
    from compressm.compression.compressor.compressor import Compressor


def state_of(compressor: Compressor) -> dict[str, Any]:
    """What ``Compressor.state_dict`` returns."""
    return {
        "format": STATE_FORMAT,
        "recipe": compressor.recipe.name,
        "policy": repr(compressor.policy),
        "schedule": repr(compressor.schedule),
        **asdict(compressor._progress),
        "waiting": compressor._waiting,
        "seen": compressor._sightings.state_dict(),
        "guard": None if compressor.guard is None else compressor.guard.state_dict(),
        "ranks": compressor.ranks,
        "history": [report.to_dict() for report in compressor.history],
    }


def restore(compressor: Compressor, state: Mapping[str, Any]) -> None:
    """Put a checked state into a Compressor; raises ArgumentError, before anything has changed, where it does not fit."""
    compressor.check_state_dict(state)
    if dict(state["ranks"]) != compressor.ranks:
        remedy = "Load the model first: compressm.load(path, model, optimizer=..., compressor=...) does both"
        raise bad_argument("state_dict", got=f"ranks {state['ranks']}", expected=f"ranks {compressor.ranks}", remedy=remedy)
    history = [report_from_dict(report) for report in state["history"]]
    seen = parsed(state.get("seen", []))
    if compressor.guard is not None:
        compressor.guard.load(state.get("guard"), compressor._parts())
    compressor._progress = Progress.of(state)
    compressor._waiting = bool(state.get("waiting", False))
    compressor.history = history
    compressor._sightings = Sightings(bounded=compressor.schedule.adaptive, seen=seen)
    if compressor._cadence is not None:
        compressor._cadence.restart(compressor._progress.step)


def check(compressor: Compressor, state: Mapping[str, Any]) -> None:
    """Raise ArgumentError unless the state fits the recipe, the layers and the guard."""
    check_state(state, compressor.recipe.name, compressor.layers)
    if (saved := state.get("guard")) is None:
        return
    if compressor.guard is not None:
        if (progress := compressor.guard.check(saved, compressor._parts())) is not None:
            check_progress(progress, compressor.layers)
    elif saved["probation"] is not None:
        remedy = "Pass guard=Rollback(...), as in the saved run"
        raise bad_argument("guard", got=None, expected="a Rollback to validate the last reduction", remedy=remedy)


def arguments_of(compressor: Compressor) -> list[Any]:
    """What must be the same on all processes that train the model together, JSON-ready."""
    c = compressor
    named = [described(c.policy), described(c.schedule), described(c.demands)]
    needs = {name: adapter.needs(module) for name, (module, adapter) in c.layers.items()}
    chosen = [*named, c.recipe.name, c.moments, c.ema is None, c.ranks, needs, c.lr_after]
    return [*chosen, c.calibration.batches is None, c.calibration.sequences, c.guard is None]
