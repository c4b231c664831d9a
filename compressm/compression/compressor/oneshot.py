"""The one-shot reduction, for models that are done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from compressm.adapters import check_known
from compressm.compression.common.models import compressible_layers, judged, plain_model
from compressm.compression.common.undisturbed import ordinary
from compressm.compression.compressor.recipes import check_policy, choose_recipe, execute, finish, in_form
from compressm.compression.compressor.refining import STEPS, Refinement, chosen_steps
from compressm.compression.distributed.team import Team
from compressm.compression.planning.batches import replayable
from compressm.compression.planning.plans import Calibration, Demands, analyse, make_plan
from compressm.compression.planning.policies import Policy
from compressm.compression.planning.report import ReductionReport
from compressm.compression.surgery.audit import Ema, OptimizerArgument, as_optimizers, check_optimizers, check_swappable
from compressm.compression.surgery.moments import check_moments
from compressm.control import Criterion, RowCriterion


def compress(
    model: nn.Module,
    policy: Policy,
    *,
    optimizer: OptimizerArgument = None,
    calibration: Iterable[Any] | None = None,
    recipe: str | None = None,
    form: str = "auto",
    forward: Callable[[nn.Module, Any], Any] | None = None,
    ema: Ema | None = None,
    moments: str | None = None,
    multiple_of: int | None = None,
    uniform: bool = False,
    sequences: int = 64,
    criterion: Criterion | RowCriterion | None = None,
    refine: int | None = None,
) -> ReductionReport:
    """Reduce a model once, in place, for example after training.

    Arguments and errors as for :class:`Compressor`, but for ``refine``: None are 200 steps where there are calibration data and
    layers that can be distilled.  Use data Gramians (``calibration``) where there will be no training afterwards: they are what
    makes the cut itself harmless.
    """
    plain = plain_model(model)
    optimizers = as_optimizers(optimizer)
    layers = judged(in_form(compressible_layers(plain), form, Team(plain), optimizers), criterion, form, calibration)
    check_known(layers)
    chosen = choose_recipe(recipe, calibration, layers)
    moments = check_moments(chosen.moments if moments is None else moments)
    check_swappable(plain, {name: (module, adapter.parameters(module)) for name, (module, adapter) in layers.items()})
    demands = Demands(multiple_of, uniform)
    check_policy(policy, layers, demands, chosen, calibration)
    check_optimizers(layers, plain, optimizers)
    measured = Calibration(replayable(calibration), forward, sequences)
    steps = chosen_steps(refine, STEPS, layers, calibration, measured.team)
    started = time.perf_counter()
    with ordinary():
        candidates = analyse(plain, layers, chosen.convention, measured)
        planned = make_plan(candidates, policy, demands=demands)
        refinement = Refinement(steps, measured) if steps else None
        planned = execute(plain, planned, optimizers=optimizers, ema=ema, moments=moments, refinement=refinement)
    return finish(planned, 0, f"one-shot, {policy}, recipe {chosen.name}", started)
