"""What Compressor and compress share: recipes, and carrying a plan out."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from compressm.compression.common.models import Layers
from compressm.compression.compressor.refining import Errors, Refinement, refine
from compressm.compression.distributed.team import Team
from compressm.compression.planning.plans import Demands, Planned, describe_edits, with_new_kernels
from compressm.compression.planning.policies import Policy
from compressm.compression.planning.report import LayerReduction, ReductionPlan, ReductionReport, describe
from compressm.compression.surgery.audit import Ema, Optimizers
from compressm.compression.surgery.edits import apply_edits
from compressm.compression.surgery.optimizer_state import masters_of
from compressm.compression.surgery.optional import give
from compressm.compression.surgery.references import References
from compressm.errors import ArgumentError, bad_argument

log = logging.getLogger("compressm")


@dataclass(frozen=True)
class Recipe:
    """A named bundle of choices.

    Attributes:
        name: as passed to the Compressor.
        convention: whose spectrum, ``"real"`` or ``"complex"``.
        moments: default treatment of optimizer state.
        shared_budget: attempts share one tau, so that the product of the kept fractions is 1 - tau.
        data: whether data Gramians are used.
    """

    name: str
    convention: str
    moments: str
    shared_budget: bool
    data: bool


RECIPES = {
    "default": Recipe("default", "real", "transport", shared_budget=True, data=True),
    "paper": Recipe("paper", "complex", "slice", shared_budget=False, data=False),
}


def execute(
    model: nn.Module,
    planned: Planned,
    *,
    optimizers: Optimizers,
    ema: Ema | None,
    moments: str,
    team: Team | None = None,
    refinement: Refinement | None = None,
) -> Planned:
    """Carry a plan out: describe every edit, then apply all of them or none, on all processes of the team.

    Args:
        refinement: how edits are refined in between; None: not at all.

    Returns:
        the plan, whose records say what refining came to.
    """
    errors: dict[str, Errors] = {}

    def apply(names: Sequence[str]) -> None:
        part = replace(planned, reductions={name: planned.reductions[name] for name in names})
        layers = {name: planned.layers[name] for name in names}
        before = References(layers, optimizers, ema)
        try:
            needed = {name: adapter.needs(module) for name, (module, adapter) in layers.items()}
            give(layers, {name: keys for name, keys in needed.items() if keys}, optimizers, ema)
            edits = describe_edits(part)
            if refinement is not None:
                edits, found = refine(model, planned.layers, edits, refinement)
                errors.update(found)
            if edits:
                apply_edits(model, edits, planned.layers, optimizers=optimizers, ema=ema, moments=moments)
        except BaseException:
            before.restore()
            raise

    changing = {name: planned.layers[name] for name in planned.reductions}
    (Team(model) if team is None else team).carry_out(apply, changing, optimizers, ema)
    return replace(planned, plan=ReductionPlan(tuple(_with_errors(layer, errors) for layer in planned.plan.layers)))


def _with_errors(layer: LayerReduction, errors: Mapping[str, Errors]) -> LayerReduction:
    before, after = errors.get(layer.name, (None, None))
    return replace(layer, refine_error_before=before, refine_error_after=after)


def finish(planned: Planned, step: int, reason: str, started: float) -> ReductionReport:
    """The report of a plan that was carried out; logs how ranks and kernels changed."""
    layers = with_new_kernels(planned)
    kept = sum(not layer.changed for layer in layers)
    if kept:
        reason += f"; {kept} of {len(layers)} layers left alone (too little to gain)"
    report = ReductionReport(step, time.perf_counter() - started, reason, layers)
    log.info("%s", report.summary)
    for layer in layers:
        log.info("%s", describe(layer))
    return report


def choose_recipe(name: str | None, calibration: Any, layers: Layers) -> Recipe:
    """The recipe of that name (None: the default).

    Raises:
        ArgumentError: unknown, not for these layers, or calibration for one that takes none.
    """
    recipe = RECIPES.get(name or "default")
    if recipe is None:
        raise bad_argument("recipe", got=repr(name), expected=f"one of {', '.join(RECIPES)}")
    for layer, (module, adapter) in layers.items():
        if recipe.convention not in adapter.conventions:
            got = f"{name!r} for layer {layer!r} ({type(module).__name__})"
            raise bad_argument("recipe", got=got, expected="'default', as this one has no method for such layers")
    if calibration is not None and not recipe.data and not any(adapter.paper_uses_data for _, adapter in layers.values()):
        raise ArgumentError(
            f"calibration: recipe {recipe.name!r} is data-free for these layers, expected None. Drop calibration or the recipe"
        )
    return recipe


def in_form(layers: Layers, form: Any, team: Team, optimizers: Optimizers) -> Layers:
    """The layers with the adapters of a form.

    Args:
        form: ``"auto"``, or one of ``Adapter.forms``.
        team, optimizers: those that train the layers; some cannot take new parameters, which rules out forms that need some.

    Raises:
        ArgumentError: it is none, or a layer cannot become that.
    """
    known = sorted({name for _, adapter in layers.values() for name in adapter.forms})
    if form != "auto" and form not in known:
        raise bad_argument("form", got=repr(form), expected=" or ".join(map(repr, ["auto", *known])) + ", as these layers have")
    obstacle = team.fixed or ("attached master copies" if masters_of(optimizers) else "")
    chosen = {}
    for name, (module, adapter) in layers.items():
        formed = adapter.in_form(module, None if form == "auto" else form) if adapter.forms else adapter
        if obstacle and formed.needs(module):
            if form != "auto":
                got = f"{form!r} for layer {name!r}, which would get new parameters, with {obstacle}"
                remedy = "Or build the layers with maps (d_features=)"
                raise bad_argument("form", got=got, expected="'strict' or 'auto'", remedy=remedy)
            formed = adapter
        chosen[name] = (module, formed)
    return chosen


def check_policy(policy: Any, layers: Layers, demands: Demands, recipe: Recipe, calibration: Any) -> Policy:
    """The policy, if it can be carried out on these layers.

    Raises:
        ArgumentError: it is none, or cannot.
    """
    known = {}
    for name, (module, adapter) in layers.items():
        bounded = adapter.bounded(recipe.convention, calibration is not None)
        known[name] = demands.of(name, module, adapter, bounded=bounded)
    check_kind(policy, Policy, "policy").check_layers(known)
    return policy


def check_kind(value: Any, kind: type, name: str) -> Any:
    """The value, if it is an instance of a policy, schedule or guard class; ArgumentError otherwise."""
    if not isinstance(value, kind):
        got = value.__name__ + " (the class)" if isinstance(value, type) else repr(value)
        expected = {
            "policy": "an Energy, FixedRank, Shrink, Budget or ErrorBound",
            "schedule": "a Once, Warmup, Every, At or WhenStable",
        }
        raise bad_argument(name, got=got, expected=f"{expected.get(name, 'a Rollback')} instance")
    return value
