"""What compression needs to know about a layer, and the description of one edit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from compressm.errors import ModelError

TensorMap = Mapping[str, Tensor]
Transport = Callable[[TensorMap], dict[str, Tensor]]


@dataclass(frozen=True)
class LayerEdit:
    """Everything that changes when one layer is reduced; describing it mutates nothing.

    The three functions take a mapping that holds one tensor for every name of ``tensors`` in the old shape and return
    float64 (complex128) tensors in the new shape.

    Attributes:
        rank_before, rank_after: states before and after.
        tensors: parameter name (relative to the layer) to its new value, in the parameter's dtype and device.
        first_moments: carries gradient-like state (Adam's ``exp_avg``, SGD's ``momentum_buffer``).
        second_moments: carries squared-gradient state (Adam's ``exp_avg_sq``).
        values: carries another copy of the parameters (an EMA) through the same change of basis.
        subset: where the reduced states are some of the old ones: cuts a tensor like the named parameter down to them.
        attributes: plain attributes and buffers of the reduced layer that its rank alone does not say, in the place of those of
            :meth:`Adapter.attributes`, which has the same names.
    """

    rank_before: int
    rank_after: int
    tensors: dict[str, Tensor]
    first_moments: Transport
    second_moments: Transport
    values: Transport
    subset: Callable[[str, Tensor], Tensor] | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Reduced(Protocol):
    """What a reduction says of itself, whatever else it holds for ``Adapter.edit``."""

    @property
    def order(self) -> int:
        """States of the layer that are left."""

    @property
    def real_order(self) -> int:
        """How many of the largest values of the spectrum belong to them."""

    @property
    def method(self) -> str:
        """How it was found, in words."""

    @property
    def output_error(self) -> float | None:
        """Relative root mean square error of the layer's output on the calibration data; None where it is not known."""

    def kept(self, order: int) -> Tensor:
        """(``self.order``,) int64 ascending: which of the ``order`` old states are kept, or take most part in what is.

        Only schedules that watch them ask.
        """


Kind = TypeVar("Kind", bound=Reduced)  # of the reductions of one family of layers


class Analysis(ABC, Generic[Kind]):
    """One layer's spectrum, ready to be cut at any rank.

    Attributes:
        hsv: (n,) float64 Hankel singular values, descending.
        convention: which system they belong to: ``"real"``, ``"complex"``, ``"selective"`` or ``"mean-LTI"``.
        gramians: what they were computed from, ``"data"``, ``"data-free"`` or ``"data P, data-free Q"``.
        bounded: whether 2 * sum of the values cut bounds the H-infinity norm of the error.
    """

    hsv: Tensor
    convention: str
    gramians: str
    bounded: bool

    @abstractmethod
    def modes(self, order: int) -> int:
        """States of the layer that the ``order`` largest values take."""

    @abstractmethod
    def reduce(self, rank: int) -> Kind:
        """The reduction to ``rank`` states that ``Adapter.edit`` takes.

        Raises:
            NumericalError: there is none that is finite.
        """

    @abstractmethod
    def spectrum_after(self, reduction: Kind) -> Tensor:
        """Hankel singular values of the reduced layer, descending."""

    def scores(self) -> Tensor | None:
        """(N,) how much each of the layer's states counts by itself; None, by default, where that is not known."""
        return None

    def root(self) -> Tensor | None:
        """Q^(1/2) P^(1/2), (..., n, n), whose singular values are the spectrum, over leading axes by the root of their sum of
        squares: how far it changes bounds how far they do (Weyl).  None, by default, where it is not known.
        """
        return None


class Meter(ABC):
    """Measures one layer while calibration batches run through the model.

    Attributes:
        signals: outputs of the batch now running whose gradients :meth:`adjoint` wants.
        part: name of a sub-module of the layer whose output :meth:`part_output` wants, before :meth:`observe` is called.
        replaying: the backward pass runs a checkpointed part of the model again: what :meth:`observe` sees has been seen, but
            it must return what it did before.
    """

    replaying = False
    part: str | None = None

    def __init__(self) -> None:
        self.signals: list[Tensor] = []

    @abstractmethod
    def observe(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Forward hook, outside of autocast and inference mode; may return another output of equal value."""

    def part_output(self, output: Any) -> None:  # noqa: B027 (nothing to do by default)
        """Take what the sub-module ``part`` gave."""

    def adjoint(self, grad: Tensor) -> None:  # noqa: B027 (nothing to do by default)
        """Take the gradient of the probed model output by one of ``signals``."""

    def begin(self, seed: int) -> None:  # noqa: B027 (nothing to do by default)
        """A batch begins; whatever is drawn at random for it follows from ``seed``, wherever the batch runs."""

    def merge(self, add: Callable[[Any], Any], join: Callable[[Tensor], Tensor]) -> None:
        """Take in what other processes measured of the same layer.

        Args:
            add: the sum over all processes of a tensor or an int.
            join: the tensors of all processes behind one another, along the first dimension, whose size may differ.

        Raises:
            ModelError: the adapter does not say how its measurements add up.
        """
        raise ModelError(f"{type(self).__name__} does not say how measurements of several processes add up (Meter.merge)")

    @property
    @abstractmethod
    def reached(self) -> bool:
        """Whether anything was observed."""

    @abstractmethod
    def result(self, name: str) -> Any:
        """What ``Adapter.analyse`` takes.

        Raises:
            NumericalError: the measurement is not finite; ``name`` is the layer's.
        """


class Distiller(ABC):
    """Trains some tensors of an edit so that the reduced layer gives what the old one gives, on inputs that were recorded.

    Attributes:
        groups: parameter groups of Adam: leaves that begin as the edit has them, in float32, each group with its first ``lr``.
    """

    groups: list[dict[str, Any]]

    @abstractmethod
    def take(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """What is recorded of a call of the old layer, tensors (sequences, steps, ...), in a forward hook."""

    @abstractmethod
    def prepare(self, calls: TensorMap) -> dict[str, Tensor]:
        """What :meth:`loss` takes: all that stays as it is in training, tensors (sequences, ...), of what was recorded."""

    @abstractmethod
    def loss(self, sequences: TensorMap, random: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """|o - o'|^2, differentiable in the leaves, and |o|^2 of the layer's old output o and its new one o'.

        Args:
            sequences: some of those prepared.
            random: chooses a part of the output that stands for it; None: all of it.
        """

    @abstractmethod
    def deltas(self) -> dict[str, Tensor]:
        """By name in ``LayerEdit.tensors``, what training has added: float64, zero where nothing is trained."""


class Adapter(ABC, Generic[Kind]):
    """How one family of layers reads as a system, and which tensors change together.

    An adapter has no state and never mutates a module.

    Attributes:
        ranked_by: the kind of criteria that may choose the layer's states in the place of its own reduction; None: there are
            none.
        criterion: one of that kind, or None.
    """

    paper_uses_data = False  # whether recipe "paper" averages over calibration data
    conventions: tuple[str, ...] = ("real", "complex")  # those that analyse() knows
    forms: tuple[str, ...] = ()  # what a reduced layer may be, where there is a choice; see :meth:`in_form`
    optional: tuple[str, ...] = ()  # names of parameters, relative to the layer, that a layer may lack and get by a reduction
    distils = False  # whether distiller() knows any of its edits
    ranked_by: type | None = None
    criterion: Any = None
    papers: tuple[str, ...] = ()  # keys in references.bib: who introduced the layers

    @abstractmethod
    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        """Names, relative to the layer, of the parameters whose shape depends on the rank."""

    def independent(self, module: nn.Module) -> tuple[str, ...] | None:
        """Names, relative to the layer, of parameters, buffers and submodules that are known not to depend on the rank.

        Whatever else a layer owns is judged by name and shape before it is reduced (see ``registry.check_known``).  None: the
        adapter does not say; then it is taken to know all of the class that it is registered for, and nothing of subclasses.
        """
        return None

    def reads(self, module: nn.Module) -> tuple[str, ...]:
        """Names, relative to the layer, of the parameters that :meth:`analyse`, :meth:`meter` and :meth:`edit` look at; all."""
        return tuple(name for name, _ in module.named_parameters())

    def in_form(self, module: nn.Module, form: str | None) -> Adapter[Kind]:
        """The adapter that reduces the layer to one of :attr:`forms`; where there is no choice, this one.

        Args:
            form: one of :attr:`forms`, or None for what suits the layer best.

        Raises:
            ArgumentError: the layer cannot become that.
        """
        return self

    def needs(self, module: nn.Module) -> tuple[str, ...]:
        """Those of :attr:`optional` that the layer lacks and that :meth:`edit` will change; none by default."""
        return ()

    def identities(self, module: nn.Module) -> dict[str, Tensor]:
        """Values of all of :attr:`optional` with which the layer is what it would be without them."""
        return {}

    def neighbour(self, module: nn.Module) -> str:
        """Name, relative to the layer, of the parameter whose group in the optimizer those of :attr:`optional` join.

        They are trained if it is.
        """
        return self.parameters(module)[0]

    @abstractmethod
    def rank(self, module: nn.Module) -> int:
        """Number of states."""

    def size(self, module: nn.Module) -> int:
        """The number of states with which the layer would be built anew, optional parameters apart; by default :meth:`rank`."""
        return self.rank(module)

    @abstractmethod
    def state_bytes(self, module: nn.Module, rank: int) -> int:
        """Bytes that the layer would carry from one token to the next at ``rank`` states, per sequence.

        What a server keeps for every sequence: the recurrent state, float32 or wider as the layer computes it, and whatever
        else the layer remembers of earlier tokens.  Grows with the rank.
        """

    def bounded(self, convention: str, measured: bool) -> bool:
        """Whether the spectrum that :meth:`analyse` would find bounds the error (``Analysis.bounded``); False by default.

        Args:
            convention: as in :meth:`analyse`.
            measured: whether there will be calibration data.
        """
        return False

    @abstractmethod
    def analyse(self, module: nn.Module, name: str, convention: str, measured: Any | None) -> Analysis[Kind]:
        """The layer's spectrum and what is needed to cut it.

        Args:
            module: the layer.
            name: its name in the model, for messages.
            convention: ``"real"`` for our default, ``"complex"`` for the paper's method.
            measured: what the layer's meter returned, or None for a data-free analysis.

        Raises:
            NumericalError: a parameter is NaN or infinite, or the layer is not stable.
            ModelError: a parameter is not a plain parameter (parametrized, missing).
        """

    @abstractmethod
    def meter(self, module: nn.Module, name: str, sequences: int, rows_per_state: int | None, seed: int) -> Meter:
        """Measures the layer on ``sequences`` calibration sequences.

        Args:
            rows_per_state: about so many time steps per state enter the statistics, chosen evenly at random; None: all.
            seed: of that choice.
        """

    def instrument(self, module: nn.Module, name: str, sequences: int, rows_per_state: int | None, seed: int) -> Meter:
        """What calibration attaches to the layer: the :meth:`meter`, and what the criterion wants besides."""
        return self.meter(module, name, sequences, rows_per_state, seed)

    def judged_by(self, criterion: Any, module: nn.Module, name: str) -> Self:
        """The same adapter with a criterion of the kind :attr:`ranked_by`.

        Raises:
            ArgumentError: the layer has no states of its own that could be kept as they are.
        """
        judged = copy(self)
        judged.criterion = criterion
        return judged

    @abstractmethod
    def slowest(self, module: nn.Module) -> float:
        """Largest modulus of an eigenvalue of the recurrence."""

    @abstractmethod
    def edit(self, module: nn.Module, reduction: Kind) -> LayerEdit:
        """Describe how the layer becomes the reduced system."""

    def distiller(self, module: nn.Module, edit: LayerEdit) -> Distiller | None:
        """Trains what an edit of the layer as it is now leaves; None, by default, where there is nothing of the kind."""
        return None

    @abstractmethod
    def blank(self, module: nn.Module, rank: int) -> dict[str, Tensor]:
        """Zero tensors in the shapes of ``rank`` states, dtype and device of the module's parameters."""

    def attributes(self, module: nn.Module, rank: int) -> dict[str, Any]:
        """What plain attributes and buffers, by name relative to the layer, must be at ``rank`` states; none by default."""
        return {}

    def as_stored(self, module: nn.Module, names: Collection[str]) -> dict[str, Any]:
        """Those of :meth:`attributes` that must change, at the same rank, before tensors of these names can be loaded.

        The names are relative to the layer.  None by default.
        """
        return {}

    def round_to(self, module: nn.Module) -> int:
        """Ranks become multiples of this where the user asks for no ``multiple_of``; 1 by default."""
        return 1

    def check_rank(self, module: nn.Module, rank: int) -> None:
        """Raise ArgumentError where the layer's own kernels cannot run ``rank`` states; not asked with a ``multiple_of``."""

    def remark(self, module: nn.Module) -> str:
        """What to expect of a reduction of such layers, in one sentence for ``inspect``; empty by default."""
        return ""

    def kernel_plan(self, module: nn.Module) -> str:
        """Which kernel runs the layer now, in one line; empty before the first forward pass."""
        plan = getattr(module, "kernel_plan", None)
        return "" if plan is None else str(plan)
