"""Layers whose states are matrices, of which groups of heads share keys and queries: what their reductions have in common.

Two forms:

* strict: a subset of the rows of every group goes on, with what makes these channels of keys and queries.  It stays a layer of
  its class, which every library loads.
* projected: all channels stay, and two maps behind the activation make fewer rows of them.  Layers that have no maps get them
  by a reduction.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters._ranked import RowRanked, Rows
from compressm.adapters.base import Adapter, Analysis, LayerEdit, Meter, TensorMap, Transport
from compressm.adapters.parameters import check_finite, label, own_parameter, plain_parameters
from compressm.control import (
    MatrixMoments,
    MatrixReduction,
    RowCriterion,
    best_rows,
    cross_root,
    pair_spectrum,
    subset,
    subset_spectrum,
)
from compressm.errors import ModelError, NumericalError, bad_argument

WHITE = (4, 256)  # sequences and steps of white noise that stand in for data
VECTOR = 8  # channels at a time that causal-conv1d's kernels load, out of rows that have to be multiples as well


@dataclass(frozen=True, eq=False)
class MatrixAnalysis(Analysis[MatrixReduction]):
    """Second moments of a recurrence with matrix-valued states.

    The squares of the spectrum are energies of its output: in the projected form what a cut would lose if queries and the state
    were independent and the state as the keys, in the strict form what backward selection takes away.  With a criterion it is
    its scores, in every group from the largest on, summed over the groups.
    """

    moments: MatrixMoments
    gramians: str
    adapter: MatrixAdapter
    projected: bool
    criterion: RowCriterion | None = None
    convention: str = "selective"
    bounded: bool = False
    hsv: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.criterion is None:
            hsv = (pair_spectrum if self.projected else subset_spectrum)(self.moments)
        else:
            hsv = self.criterion.row_scores(self.moments.rows()).sort(-1, descending=True).values.sum(0)
            object.__setattr__(self, "convention", "scores")
        object.__setattr__(self, "hsv", hsv)

    def modes(self, order: int) -> int:
        return order

    def reduce(self, rank: int) -> MatrixReduction:
        if self.criterion is not None:
            return best_rows(self.moments, rank, self.criterion)
        reduction = (self.adapter.projection if self.projected else subset)(self.moments, rank)
        if not bool(torch.isfinite(reduction.key).all() and torch.isfinite(reduction.query).all()):
            raise NumericalError("the maps of the reduced scan are not finite, expected finite second moments of B and C")
        return reduction

    def spectrum_after(self, reduction: MatrixReduction) -> Tensor:
        return self.hsv[: reduction.order]

    def scores(self) -> Tensor:
        """Over all groups."""
        if self.criterion is not None:
            return self.criterion.row_scores(self.moments.rows()).sum(0)
        P, Q = (part.diagonal(dim1=-2, dim2=-1).clamp_min(0) for part in (self.moments.P, self.moments.Q))
        return (P * Q).sum(0).sqrt()

    def root(self) -> Tensor | None:
        """Of the projected form, whose spectrum is that of P and Q."""
        return cross_root(self.moments.P, self.moments.Q) if self.projected and self.criterion is None else None


class MatrixAdapter(RowRanked[MatrixReduction]):
    """Layers that have maps stay projected, others become what ``form`` says; recipe "paper" does not know these layers.

    Args:
        foreign: the layer belongs to another library, which has to load it again, and whose kernels want numbers of channels
            that divide well.
        form: ``"strict"`` or ``"projected"``.
    """

    conventions = ("real",)
    forms = ("strict", "projected")
    recurrence: tuple[str, ...] = ("dt_bias", "A_log")  # what decays are made of; states are as wide as the last at least
    last_axes: tuple[str, ...] = ()  # names of parameters (HV, ..., N) whose last axis are the rows of each head's state
    projections: tuple[str, ...] = ("in_proj",)  # of which a layer has one
    remedy = ""  # how a layer that takes no maps can be made to
    multiple = 1  # that kernels of other libraries like

    def __init__(self, *, foreign: bool = False, form: str = "strict") -> None:
        self.foreign, self.form = foreign, form

    @abstractmethod
    def shape(self, module: nn.Module) -> tuple[int, int]:
        """Groups G, and channels of a key in front of maps."""

    @abstractmethod
    def convolution(self, module: nn.Module) -> str:
        """Name of what convolves keys."""

    @abstractmethod
    def projection(self, moments: MatrixMoments, rank: int) -> MatrixReduction:
        """The maps of the projected form; ``optional`` names those of keys and of queries, in this order."""

    def embeddings(self, reduction: MatrixReduction) -> tuple[Tensor, Tensor]:
        """What carries gradients by keys and by queries into the new coordinates.

        Where the output stays as it is, what a key is multiplied with is E_q times what it was, and the other way round.
        """
        return reduction.query, reduction.key

    @abstractmethod
    def check_sizes(self, module: nn.Module, name: str) -> None:
        """Raise ModelError unless the layer's sizes fit together."""

    def white_meter(self, module: nn.Module, name: str) -> Meter:
        """The meter that looks at white noise."""
        return self.meter(module, name, WHITE[0], None, 0)

    def measured(self, module: nn.Module, name: str) -> MatrixMoments:
        """The moments without data: on white noise of unit variance."""
        return on_white_noise(self.white_meter(module, name), module, self.projected_by(module), name)

    def projected_by(self, module: nn.Module) -> str:
        """Name of the first of the layer's projections."""
        return next(part for part in self.projections if part in module._modules)

    def checked(self, module: nn.Module, name: str) -> dict[str, nn.Parameter]:
        """What the recurrence depends on and what changes, finite.

        Raises:
            ModelError, NumericalError: a parameter is missing or not finite, or sizes do not fit together.
        """
        parameters = plain_parameters(module, (*self.recurrence, *self.parameters(module)), name)
        check_finite(module, parameters, name)
        rates = self.recurrence[-1]
        check_finite(module, {f"exp({rates})": parameters[rates].detach().double().exp()}, name)
        self.check_sizes(module, name)
        return parameters

    def slowest(self, module: nn.Module) -> float:
        """Of what no key erases."""
        parameters = self.checked(module, "")
        dt = F.softplus(parameters["dt_bias"].detach().double())
        return float(torch.exp(-dt * parameters["A_log"].detach().double().exp()).max())

    def obstacle(self, module: nn.Module) -> str:
        """Why a layer cannot take maps, in words; empty: it can."""
        return "" if getattr(type(module), "takes_maps", False) else "whose forward has no maps"

    def in_form(self, module: nn.Module, form: str | None) -> Adapter[MatrixReduction]:
        """Projected if the layer has maps; else None is projected for our own layers, strict for those of other libraries."""
        obstacle = self.obstacle(module)
        if form is None:
            form = "projected" if self.mapped(module) or not (obstacle or self.foreign) else "strict"
        if form == "strict" and self.mapped(module):
            got = f"'strict' for a {type(module).__name__} that has maps behind its convolution"
            raise bad_argument("form", got=got, expected="'projected' or 'auto'")
        if form == "projected" and obstacle:
            got = f"'projected' for a {type(module).__qualname__} ({type(module).__module__}), {obstacle}"
            raise bad_argument("form", got=got, expected="'strict' or 'auto'", remedy=self.remedy)
        formed = copy(self)
        formed.form = form
        return formed

    def judged_by(self, criterion: Any, module: nn.Module, name: str) -> Self:
        """In the strict form, as rows are kept as they are."""
        if self.mapped(module):
            got = f"{criterion.name} for {label(module, name)}, which has maps behind its convolution"
            raise bad_argument("criterion", got=got, expected="None, as the maps mix the channels that it would choose among")
        judged = super().judged_by(criterion, module, name)
        judged.form = "strict"
        return judged

    def mapped(self, module: nn.Module) -> bool:
        """Whether maps stand between the activation and the recurrence."""
        return all(module._parameters.get(name) is not None for name in self.optional)

    def maps(self, module: nn.Module) -> bool:
        """Whether the layer has maps, or will when it is reduced."""
        return bool(self.needs(module)) or self.mapped(module)

    def needs(self, module: nn.Module) -> tuple[str, ...]:
        return self.optional if self.form == "projected" and not self.mapped(module) else ()

    def identities(self, module: nn.Module) -> dict[str, Tensor]:
        groups, features = self.shape(module)
        weight = next(module.get_submodule(self.convolution(module)).parameters())
        identity = torch.eye(features, dtype=weight.dtype, device=weight.device)
        return {name: identity.repeat(groups, 1, 1) for name in self.optional}

    def neighbour(self, module: nn.Module) -> str:
        return self.recurrence[-1]  # which is not decayed either, where anything is not

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        if self.needs(module):
            return ()
        return self.optional if self.mapped(module) else (*self.rows(module), *self._present_last_axes(module))

    def rank(self, module: nn.Module) -> int:
        if self.mapped(module):
            return own_parameter(module, self.optional[0]).shape[1]
        return self.size(module)

    def size(self, module: nn.Module) -> int:
        """Channels of a key in front of maps."""
        return self.shape(module)[1]

    def round_to(self, module: nn.Module) -> int:
        return self.multiple if self.foreign and not self.maps(module) else 1

    @torch.no_grad()
    def analyse(self, module: nn.Module, name: str, convention: str, measured: MatrixMoments | None) -> MatrixAnalysis:
        self.checked(module, name)
        if convention not in self.conventions:
            raise ModelError(f"{label(module, name)}: recipe 'paper' has none for matrix-valued states, expected 'default'")
        moments = self.measured(module, name) if measured is None else measured
        kind = "data-free" if measured is None else "data"
        return MatrixAnalysis(moments, kind, self, self.maps(module), self.criterion)

    @torch.no_grad()
    def edit(self, module: nn.Module, reduction: MatrixReduction) -> LayerEdit:
        parameters = plain_parameters(module, self.parameters(module))
        if reduction.rows is None:
            key, query = self.optional
            values = partial(_mapped, {key: reduction.key, query: reduction.query})
            first = dict(zip(self.optional, self.embeddings(reduction), strict=True))
            second = {name: map_.square() for name, map_ in first.items()}
            carried: tuple[Transport, Transport, Transport] = (partial(_mapped, first), partial(_mapped, second), values)
            subset_of = None
        else:
            select = Selection(self.rows(module), reduction.rows, self._present_last_axes(module))
            carried, subset_of = (select.all, select.all, select.all), select
        new = carried[2]({name: parameter.detach() for name, parameter in parameters.items()})
        if not all(bool(torch.isfinite(tensor).all()) for tensor in new.values()):
            raise NumericalError("the reduced recurrence has NaN or infinite weights, expected finite values")
        tensors = {name: tensor.to(parameters[name]) for name, tensor in new.items()}
        return LayerEdit(self.rank(module), reduction.order, tensors, *carried, subset_of)

    def blank(self, module: nn.Module, rank: int) -> dict[str, Tensor]:
        parameters = plain_parameters(module, self.parameters(module))
        if self.maps(module):
            return {name: map_.new_zeros(map_.shape[0], rank, map_.shape[2]) for name, map_ in parameters.items()}
        (groups, features), rows = self.shape(module), self.rows(module)
        result = {}
        for name, old in parameters.items():
            if name in rows:
                result[name] = old.new_zeros(len(old) + len(rows[name]) * groups * (rank - features), *old.shape[1:])
            else:
                result[name] = old.new_zeros(*old.shape[:-1], rank)
        return result

    def _present_last_axes(self, module: nn.Module) -> tuple[str, ...]:
        return tuple(name for name in self.last_axes if module._parameters.get(name) is not None)


@dataclass(frozen=True)
class Selection:
    """Cuts what makes keys and queries down to the kept rows of every group.

    Attributes:
        rows: by parameter, which of its rows make keys and queries.
        kept: (G, r), the rows of the states that stay.
        last_axes: names of parameters (HV, ..., N) whose last axis are rows of the states.
    """

    rows: Mapping[str, Rows]
    kept: Tensor
    last_axes: tuple[str, ...] = ()

    def __call__(self, key: str, value: Tensor) -> Tensor:
        """A tensor like the parameter of that name, with the kept rows alone."""
        if key in self.last_axes:
            index = self.kept.repeat_interleave(len(value) // len(self.kept), 0).to(value.device)
            return value.gather(-1, index.view(len(value), *[1] * (value.dim() - 2), -1).expand(*value.shape[:-1], -1))
        stay = torch.ones(len(value), dtype=torch.bool, device=self.kept.device)
        for rows in self.rows[key]:
            rows = rows.to(self.kept.device)
            stay[rows] = False
            stay[rows.gather(1, self.kept)] = True
        return value[stay.to(value.device)]

    def all(self, tensors: TensorMap) -> dict[str, Tensor]:
        """All of a layer's tensors, in float64."""
        return {key: self(key, value.double()) for key, value in tensors.items()}


def on_white_noise(meter: Meter, module: nn.Module, projection: str, name: str) -> MatrixMoments:
    """What a meter says of a layer whose input is white noise; ``projection`` is the name of its first projection."""
    weight = next(p for p in module.get_submodule(projection).parameters() if p.dim() == 2)
    noise = torch.randn(*WHITE, weight.shape[1], generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    meter.observe(module, (noise.to(weight),), {}, None)
    moments: MatrixMoments = meter.result(name)
    return moments


def _mapped(maps: TensorMap, tensors: TensorMap) -> dict[str, Any]:
    return {key: map_.to(tensors[key].device) @ tensors[key].double() for key, map_ in maps.items()}


def check_vectors(module: nn.Module, rank: int, groups: int, sides: Mapping[str, tuple[int, int]]) -> None:
    """Raise ArgumentError where a side that the kernels of the layer's library load in vectors would no longer divide by 8.

    Args:
        groups: of each, every state has two channels.
        sides: their lengths now and with ``rank`` states, by what they are.
    """
    for what, (now, then) in sides.items():
        if now % VECTOR == 0 and then % VECTOR:
            step = next(n for n in (1, 2, 4) if 2 * groups * n % VECTOR == 0)
            raise bad_argument(
                "rank",
                got=f"{rank} states for a {type(module).__name__}, which would have {then} {what}",
                expected=f"a multiple of {step}: the CUDA kernels of its library need multiples of {VECTOR} channels",
                remedy="Pass multiple_of=1 where other kernels run it",
            )
