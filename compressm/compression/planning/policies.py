"""How many states stay: rank policies."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor

from compressm.compression.common.workers import each
from compressm.control import slots
from compressm.errors import ArgumentError, NumericalError, bad_argument, check_integer, check_number

GATE = 0.95


@dataclass(frozen=True)
class Layer:
    """What is known of one layer before anything is measured.

    Attributes:
        name: module name.
        rank: states now.
        multiple_of: ranks are to be multiples of this, or what the layer has now.
        uniform: all layers are to keep the same number of states, those with fewer what they have; each layer says the same.
        state_bytes: bytes that the layer carries from one token to the next, per sequence, at a number of states; policies
            that count bytes need it.
        bounded: whether 2 * sum of the values cut of its spectrum bounds the H-infinity norm of the error.
        check_rank: raises ArgumentError for a rank that the layer cannot be reduced to; None: all are possible.
    """

    name: str
    rank: int
    _: KW_ONLY
    multiple_of: int = 1
    uniform: bool = False
    state_bytes: Callable[[int], int] | None = None
    bounded: bool = False
    check_rank: Callable[[int], None] | None = None

    def accept(self, rank: int) -> None:
        """Raise ArgumentError, which names the layer, unless it can be reduced to ``rank`` states, or has so many."""
        if self.check_rank is not None and rank < self.rank:
            try:
                self.check_rank(rank)
            except ArgumentError as error:
                raise ArgumentError(f"layer {self.name!r}: {error}") from error


@dataclass(frozen=True)
class LayerSpectrum(Layer):
    """What a policy sees of one layer.

    Attributes:
        hsv: (n,) float64 Hankel singular values, descending; n = 2 rank in the real convention, rank in the complex.
        convention: ``"real"`` or ``"complex"``, ``"selective"`` or ``"mean-LTI"``.
        keep: for policies with a budget, the fraction of the sum that this attempt must keep; else None.
        modes: how many states of the layer the leading ones of the spectrum take; None: the least that is possible.
    """

    hsv: Tensor
    convention: str
    keep: float | None = None
    modes: Callable[[int], int] | None = None

    def slots(self, order: int) -> int:
        """States of the layer that hold the ``order`` largest values of the spectrum; real eigenvalues take one each."""
        return slots(order, self.convention) if self.modes is None else self.modes(order)

    def check(self) -> None:
        """Raise NumericalError if the spectrum is all zero or not finite."""
        if not bool(torch.isfinite(self.hsv).all()):
            raise NumericalError(f"layer {self.name!r}: its Hankel singular values hold NaN or infinity, expected finite")
        if not bool((self.hsv > 0).any()):
            raise NumericalError(
                f"layer {self.name!r}: all {len(self.hsv)} Hankel singular values are zero, expected at least one positive: "
                "the layer's input, B or C is zero, so its output does not depend on any state. Remove the layer"
            )


class Policy(ABC):
    """Chooses the ranks of all layers.  Frozen and pure: what it answers depends on nothing but what it sees."""

    @abstractmethod
    def ranks(self, spectra: Mapping[str, LayerSpectrum]) -> Mapping[str, int]:
        """States to keep of every layer, by name, each between 1 and what the layer has; the latter means: leave it alone."""

    def check_layers(self, layers: Mapping[str, Layer]) -> None:  # noqa: B027 (nothing to check by default)
        """Raise ArgumentError if the policy can never be carried out on these layers; asked before training begins."""

    @property
    def budget(self) -> float | None:
        """Fraction of the sum of singular values that all attempts together must keep; None: no such budget."""
        return None

    def gentler(self) -> Policy:
        """What to try after a reduction by this policy had to be undone: removes about half as many states."""
        return HalfWay(self)


class LayerPolicy(Policy):
    """Chooses the rank of each layer by that layer alone; several may be asked at a time, from several threads."""

    @abstractmethod
    def rank(self, spectrum: LayerSpectrum) -> int:
        """Number of states to keep, between 1 and ``spectrum.rank``; the latter means: leave the layer alone."""

    def ranks(self, spectra: Mapping[str, LayerSpectrum]) -> dict[str, int]:
        return each(lambda _, spectrum: self.rank(spectrum), spectra)


def ask(policy: Policy, spectra: Mapping[str, LayerSpectrum]) -> dict[str, int]:
    """The policy's answer, checked, in the order of ``spectra``.

    Raises:
        ArgumentError: it lacks a layer, names another, or a rank is out of range.
    """
    answer = policy.ranks(spectra)
    named = set(answer) if isinstance(answer, Mapping) else None
    if named != set(spectra):
        got = type(answer).__name__ if named is None else f"one for {', '.join(map(str, answer)) or 'none'}"
        raise bad_argument("policy", got=got, expected=f"a rank for each of the layers {', '.join(spectra)}")
    for name, spectrum in spectra.items():
        rank = answer[name]
        check_integer("policy", rank, 1, spectrum.rank, expected=f"a rank between 1 and {spectrum.rank} for layer {name!r}")
    return {name: answer[name] for name in spectra}


@dataclass(frozen=True)
class HalfWay(Policy):
    """Half-way from the present ranks to those that another policy asks for, rounded up.

    Args:
        policy: the other one.
    """

    policy: Policy

    def check_layers(self, layers: Mapping[str, Layer]) -> None:
        self.policy.check_layers(layers)

    @property
    def budget(self) -> float | None:
        return self.policy.budget

    def ranks(self, spectra: Mapping[str, LayerSpectrum]) -> dict[str, int]:
        wanted = ask(self.policy, spectra)
        return {
            name: rank if rank == spectra[name].rank else between(rank, spectra[name].rank, spectra[name].multiple_of)
            for name, rank in wanted.items()
        }


@dataclass(frozen=True)
class Energy(LayerPolicy):
    """Keep the smallest rank whose Hankel singular values hold the fraction 1 - tau of their sum (of sigma, not squared).

    Args:
        tau: fraction discarded, 0 <= tau < 1; 0 keeps everything.
        keep: the same said the other way, 1 - tau; give exactly one of the two.
        gate: a layer is left alone unless its rank falls below ``gate`` times the present one (CompreSSM's 5 % rule).

    Source: CompreSSM (arXiv 2510.02823), algorithm 1.
    """

    tau: float | None = None
    keep: float | None = None
    gate: float = GATE

    def __post_init__(self) -> None:
        if (self.tau is None) == (self.keep is None):
            got = f"tau={self.tau}, keep={self.keep}"
            raise bad_argument("tau, keep", got=got, expected="exactly one of the two (keep = 1 - tau)")
        if self.keep is not None:
            check_number("keep", self.keep, "a number in (0, 1]", lambda value: 0 < value <= 1)
            object.__setattr__(self, "tau", 1 - self.keep)
        elif self.tau is not None:
            check_number("tau", self.tau, "a number in [0, 1)", lambda value: 0 <= value < 1)
            object.__setattr__(self, "keep", 1 - self.tau)
        _check_gate(self.gate)

    @property
    def budget(self) -> float:
        assert self.keep is not None
        return self.keep

    @property
    def cut(self) -> float:
        """The fraction discarded, however it was said."""
        assert self.tau is not None
        return self.tau

    def gentler(self) -> Energy:
        """Half of tau."""
        return replace(self, tau=self.cut / 2, keep=None)

    def rank(self, spectrum: LayerSpectrum) -> int:
        spectrum.check()
        order = energy_order(spectrum.hsv, self.cut if spectrum.keep is None else 1 - spectrum.keep)
        now, multiple = spectrum.rank, spectrum.multiple_of
        least = _round_and_gate(slots(order, spectrum.convention), now, multiple, self.gate)
        return now if least == now else _round_and_gate(spectrum.slots(order), now, multiple, self.gate)


@dataclass(frozen=True)
class FixedRank(LayerPolicy):
    """Cut every layer to a given number of states, or layers by name; layers that have no more are left alone.

    Args:
        states: one positive number for all layers, or ``{module name: number}`` (layers not named stay); not rounded to the
            Compressor's ``multiple_of``.
    """

    states: int | Mapping[str, int]

    def __post_init__(self) -> None:
        if isinstance(self.states, Mapping):
            object.__setattr__(self, "states", dict(self.states))
        named = self.states.items() if isinstance(self.states, dict) else [("rank", self.states)]
        for name, value in named:
            check_integer(f"FixedRank {name}", value)

    def check_layers(self, layers: Mapping[str, Layer]) -> None:
        if isinstance(self.states, dict) and (unknown := sorted(set(self.states) - set(layers))):
            expected = f"names of state-space layers of the model: {', '.join(layers)}"
            raise bad_argument("FixedRank", got=", ".join(unknown), expected=expected)
        for layer in layers.values():
            layer.accept(self._wanted(layer))

    def _wanted(self, layer: Layer) -> int:
        return self.states.get(layer.name, layer.rank) if isinstance(self.states, Mapping) else self.states

    def rank(self, spectrum: LayerSpectrum) -> int:
        wanted = self._wanted(spectrum)
        if wanted >= spectrum.rank:
            return spectrum.rank
        spectrum.check()
        return wanted


@dataclass(frozen=True)
class Shrink(LayerPolicy):
    """Remove a fraction of the states at every attempt, whatever the spectrum.

    Args:
        fraction: part of the present states to remove, in (0, 1); 0.5 halves the state.
        gate: as in :class:`Energy`.
    """

    fraction: float
    gate: float = GATE

    def __post_init__(self) -> None:
        check_number("fraction", self.fraction, "a number in (0, 1)", lambda value: 0 < value < 1)
        _check_gate(self.gate)

    def rank(self, spectrum: LayerSpectrum) -> int:
        spectrum.check()
        wanted = max(1, math.ceil(spectrum.rank * (1 - self.fraction) - 1e-9))
        return _round_and_gate(wanted, spectrum.rank, spectrum.multiple_of, self.gate)

    def gentler(self) -> Shrink:
        """Half of the fraction."""
        return replace(self, fraction=self.fraction / 2)


@dataclass(frozen=True)
class ErrorBound(LayerPolicy):
    """Keep the smallest rank at which the error of every layer is bounded by a value, at every reduction anew.

    Behind the m largest of the n Hankel singular values sigma_i, balanced truncation leaves an error of at most
    2 (sigma_{m+1} + ... + sigma_n) in the H-infinity norm, the largest gain from any input to the output's error.  Relative,
    this is divided by sigma_1, which is at most the norm of the layer itself: the error's share of the layer's gain is then
    no larger than the value.

    The bound belongs to data-free Gramians of linear time-invariant layers.  Where a layer is selective, or calibration data
    replace the Gramians, there is none, and the policy raises rather than guess.  ``LayerReduction.error_bound`` says what
    was reached, and None where the reduced system had to be found in another way.

    Args:
        value: a positive number.
        relative: whether it is a share of the layer's largest gain; False: in the units of the layer's output per input.

    Source: Enns 1984; Glover 1984; in discrete time Al-Saggaf and Franklin, IEEE TAC 32 (1987); Antoulas, "Approximation of
    Large-Scale Dynamical Systems" (2005), 7.2.
    """

    value: float
    relative: bool = True

    def __post_init__(self) -> None:
        check_number("value", self.value, "a positive number", lambda value: 0 < value < math.inf)
        if not isinstance(self.relative, bool):
            raise bad_argument("relative", got=repr(self.relative), expected="True or False")

    def check_layers(self, layers: Mapping[str, Layer]) -> None:
        for layer in layers.values():
            if not layer.bounded:
                raise bad_argument(
                    "policy",
                    got=f"ErrorBound for layer {layer.name!r}, whose spectrum would bound no error",
                    expected="a policy that needs no bound",
                    remedy="Drop calibration (data Gramians have no bound, nor have selective layers), or use Energy or Budget",
                )

    def rank(self, spectrum: LayerSpectrum) -> int:
        self.check_layers({spectrum.name: spectrum})
        spectrum.check()
        limit = self.value * float(spectrum.hsv[0]) if self.relative else self.value
        order = max(1, int((2 * _tails(spectrum.hsv) > limit).sum()))
        return _round_and_gate(spectrum.slots(order), spectrum.rank, spectrum.multiple_of, 1.0)

    def gentler(self) -> ErrorBound:
        """Half of the value."""
        return replace(self, value=self.value / 2)


def between(low: int, high: int, multiple_of: int) -> int:
    """Half-way from ``low`` to ``high``, rounded up, also to a multiple; at most ``high``."""
    return _round_and_gate(-(-(low + high) // 2), high, multiple_of, 1.0)


def energy_order(hsv: Tensor, tau: float) -> int:
    """Smallest m such that the values behind the m largest sum to at most tau times the sum of all.

    Args:
        hsv: (n,) descending, non-negative, not all zero.
        tau: fraction discarded; 0 returns n, so that rounding never cuts.
    """
    if tau <= 0:
        return len(hsv)
    tail = _tails(hsv)
    return max(1, int((tail > tau * tail[0]).sum()))


def _tails(hsv: Tensor) -> Tensor:
    """(n,) float64, entry m the sum of ``hsv[m:]``."""
    return torch.flip(torch.cumsum(torch.flip(hsv.double(), (0,)), 0), (0,))


def _round_and_gate(wanted: int, rank: int, multiple_of: int, gate: float) -> int:
    rounded = min(rank, max(1, -(-wanted // multiple_of) * multiple_of))
    return rounded if rounded < gate * rank else rank


def _check_gate(gate: float) -> None:
    check_number("gate", gate, "a number in (0, 1]", lambda value: 0 < value <= 1)
