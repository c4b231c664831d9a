"""From a model to a plan: read the layers, balance them, ask the policy, reduce.  Changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from compressm.adapters import Adapter, Analysis, LayerEdit, Reduced
from compressm.compression.common.models import Layers
from compressm.compression.common.workers import each
from compressm.compression.distributed.team import Team
from compressm.compression.planning.calibration import collect
from compressm.compression.planning.policies import FixedRank, HalfWay, Layer, LayerSpectrum, Policy, ask
from compressm.compression.planning.report import LayerReduction, ReductionPlan
from compressm.errors import NumericalError, check_integer


@dataclass(frozen=True)
class Calibration:
    """How data Gramians are measured.

    Attributes:
        batches: iterable of batches, or None for data-free Gramians.
        forward: ``forward(model, batch) -> output``, or None.
        sequences: at most so many sequences, over all processes.
        team: the processes that train the model together.
    """

    batches: Iterable[Any] | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    sequences: int = 64
    team: Team = field(default_factory=Team)


@dataclass(frozen=True)
class Candidate:
    """One layer analysed, before its rank is chosen."""

    module: nn.Module
    adapter: Adapter
    rank: int
    analysis: Analysis


@dataclass(frozen=True)
class Planned:
    """A plan together with what surgery needs to carry it out: the reduction of every layer that changes."""

    plan: ReductionPlan
    layers: Layers
    reductions: Mapping[str, Reduced]


def analyse(model: nn.Module, layers: Layers, convention: str, calibration: Calibration) -> dict[str, Candidate]:
    """Read every layer and compute its spectrum, all from statistics of the model as it is.

    Raises:
        NumericalError, DataError, ArgumentError: see ``Adapter.analyse`` and ``calibration.collect``.
    """
    measured = {}
    if calibration.batches is not None:
        measured = collect(
            model, layers, calibration.batches, forward=calibration.forward, sequences=calibration.sequences,
            team=calibration.team,
        )  # fmt: skip

    def candidate(name: str, layer: tuple[nn.Module, Adapter]) -> Candidate:
        module, adapter = layer
        return Candidate(module, adapter, adapter.rank(module), adapter.analyse(module, name, convention, measured.get(name)))

    with calibration.team.together("analysing the layers"):
        return calibration.team.each(candidate, layers)


@dataclass(frozen=True)
class Demands:
    """What is asked of ranks whatever the policy.

    Attributes:
        multiple_of: ranks are to be multiples of this; rounding is the policy's, which knows what it promises.  None: of what
            suits each layer, see ``Adapter.round_to``.
        uniform: every layer keeps as many states as the one for which the policy answers most.
    """

    multiple_of: int | None = None
    uniform: bool = False

    def __post_init__(self) -> None:
        if self.multiple_of is not None:
            check_integer("multiple_of", self.multiple_of)

    def of(self, name: str, module: nn.Module, adapter: Adapter, *, bounded: bool) -> Layer:
        """What a policy may know of a layer before it is measured."""
        asked, rank = self.multiple_of, adapter.rank(module)
        return Layer(
            name,
            rank,
            multiple_of=adapter.round_to(module) if asked is None else asked,
            uniform=self.uniform,
            state_bytes=partial(adapter.state_bytes, module),
            bounded=bounded,
            check_rank=partial(adapter.check_rank, module) if asked is None else None,
        )


def make_plan(
    candidates: Mapping[str, Candidate],
    policy: Policy,
    *,
    keep: Mapping[str, float] | None = None,
    demands: Demands = Demands(),
    team: Team | None = None,
) -> Planned:
    """Choose ranks and reduce.

    Args:
        candidates: from :func:`analyse`.
        policy: the rank policy.
        keep: per layer, the fraction that this attempt must keep of a shared budget; None: the policy's own.
        demands: what is asked of the ranks besides.
        team: the processes that train the model together; rank 0 decides for all of them.

    Raises:
        NumericalError: a spectrum is all zero or not finite (names the layer).
        ArgumentError: the policy answers what a layer cannot be reduced to.
    """
    team = Team() if team is None else team
    with team.together("choosing the ranks"):
        spectra = {name: _spectrum(name, item, (keep or {}).get(name), demands) for name, item in candidates.items()}
        ranks = ask(policy, spectra)
        if demands.uniform:
            ranks = {name: min(candidates[name].rank, max(ranks.values())) for name in ranks}
        for name, rank in ranks.items():
            spectra[name].accept(rank)
    ranks = team.decide(ranks)

    def reduced(name: str, item: Candidate) -> tuple[LayerReduction, Reduced | None]:
        return _reduced(name, item, ranks[name])

    with team.together("reducing the layers"):
        done = each(reduced, candidates)
    layers = {name: (item.module, item.adapter) for name, item in candidates.items()}
    reductions = {name: reduction for name, (_, reduction) in done.items() if reduction is not None}
    team.same("ranks after the reduction", [[record.name, record.rank_after, record.method] for record, _ in done.values()])
    records = team.decide([asdict(record) for record, _ in done.values()])
    return Planned(ReductionPlan(tuple(map(LayerReduction.from_dict, records))), layers, reductions)


def raised(candidates: Mapping[str, Candidate], planned: Planned, *, demands: Demands, team: Team) -> Planned | None:
    """The plan with ranks half-way from its own to the present ones; None where nothing would be left to reduce."""
    again = make_plan(candidates, HalfWay(FixedRank(planned.plan.ranks)), demands=demands, team=team)
    return again if again.plan.changed else None


def in_view(candidates: Mapping[str, Candidate], planned: Planned) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """Per layer its spectrum, and which of its states the plan keeps."""
    spectra = {name: item.analysis.hsv.tolist() for name, item in candidates.items()}
    kept = {name: list(range(item.rank)) for name, item in candidates.items()}
    return spectra, kept | {name: cut.kept(candidates[name].rank).tolist() for name, cut in planned.reductions.items()}


def _spectrum(name: str, item: Candidate, keep: float | None, demands: Demands) -> LayerSpectrum:
    """What a policy sees of a layer."""
    analysis = item.analysis
    layer = demands.of(name, item.module, item.adapter, bounded=analysis.bounded)
    return LayerSpectrum(**vars(layer), hsv=analysis.hsv, convention=analysis.convention, keep=keep, modes=analysis.modes)


def _reduced(name: str, item: Candidate, rank: int) -> tuple[LayerReduction, Reduced | None]:
    """One layer's record and, if it changes, its reduction."""
    if rank == item.rank:
        return _record(name, item, None), None
    try:
        reduction = item.analysis.reduce(rank)
        return _record(name, item, reduction), reduction
    except NumericalError as error:
        raise NumericalError(f"layer {name!r}: {error}") from error


def describe_edits(planned: Planned) -> dict[str, LayerEdit]:
    """How every layer that changes becomes its reduced system; mutates nothing."""

    def edit(name: str, reduction: Reduced) -> LayerEdit:
        module, adapter = planned.layers[name]
        return adapter.edit(module, reduction)

    return each(edit, planned.reductions)


def with_new_kernels(planned: Planned) -> tuple[LayerReduction, ...]:
    """The plan's records with ``kernel_plan_after`` read from the modules; call after surgery."""
    return tuple(
        replace(record, kernel_plan_after=planned.layers[record.name][1].kernel_plan(planned.layers[record.name][0]))
        for record in planned.plan.layers
    )


def _record(name: str, item: Candidate, reduction: Reduced | None) -> LayerReduction:
    analysis, hsv = item.analysis, item.analysis.hsv
    kernel = item.adapter.kernel_plan(item.module)
    common: dict[str, Any] = {"name": name, "rank_before": item.rank, "spectrum": tuple(hsv.tolist())}
    common |= {"convention": analysis.convention, "gramians": analysis.gramians}
    common |= {"kernel_plan_before": kernel, "kernel_plan_after": kernel}
    after = item.rank if reduction is None else reduction.order
    sizes = [item.adapter.state_bytes(item.module, rank) for rank in (item.rank, after)]
    common |= {"rank_after": after, "state_bytes_before": sizes[0], "state_bytes_after": sizes[1]}
    if reduction is None:
        bound = 0.0 if analysis.bounded else None
        return LayerReduction(**common, spectrum_after=common["spectrum"], discarded=0.0, error_bound=bound, method="identity")
    kept = reduction.real_order
    tail = float(hsv[kept:].sum())
    return LayerReduction(
        **common,
        spectrum_after=tuple(analysis.spectrum_after(reduction).tolist()),
        discarded=tail / float(hsv.sum()),
        error_bound=2 * tail if analysis.bounded and reduction.method == "balanced" else None,
        method=reduction.method,
        output_error=reduction.output_error,
    )
