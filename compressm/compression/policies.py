"""How many states stay: rank policies."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressm.control import slots
from compressm.errors import NumericalError, bad_argument

GATE = 0.95


@dataclass(frozen=True)
class LayerSpectrum:
    """What a policy sees of one layer.

    Attributes:
        name: module name.
        rank: states now.
        hsv: (n,) float64 Hankel singular values, descending; n = 2 rank in the real convention, rank in the complex.
        convention: ``"real"`` or ``"complex"``.
        keep: for policies with a budget, the fraction of the sum that this attempt must keep; else None.
        modes: how many states of the layer the leading ones of the spectrum take; None: the least that is possible.
    """

    name: str
    rank: int
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
    """Chooses the rank of one layer.  Frozen and pure: several layers may be asked at a time, from several threads."""

    multiple_of: int | None = None

    @abstractmethod
    def rank(self, spectrum: LayerSpectrum, multiple_of: int = 1) -> int:
        """Number of states to keep, between 1 and ``spectrum.rank``; the latter means: leave the layer alone."""

    def check_layers(self, ranks: Mapping[str, int]) -> None:  # noqa: B027 (nothing to check by default)
        """Raise ArgumentError if the policy names layers that the model does not have."""

    @property
    def budget(self) -> float | None:
        """Fraction of the sum of singular values that all attempts together must keep; None: no such budget."""
        return None

    def gentler(self) -> Policy:
        """What to try after a reduction by this policy had to be undone: removes about half as many states."""
        return HalfWay(self)


@dataclass(frozen=True)
class HalfWay(Policy):
    """Half-way from the present rank to the one that another policy asks for, rounded up.

    Args:
        policy: the other one.
    """

    policy: Policy

    def check_layers(self, ranks: Mapping[str, int]) -> None:
        self.policy.check_layers(ranks)

    @property
    def budget(self) -> float | None:
        return self.policy.budget

    def rank(self, spectrum: LayerSpectrum, multiple_of: int = 1) -> int:
        wanted = self.policy.rank(spectrum, multiple_of)
        multiple = self.policy.multiple_of or multiple_of
        return spectrum.rank if wanted == spectrum.rank else between(wanted, spectrum.rank, multiple)


@dataclass(frozen=True)
class Energy(Policy):
    """Keep the smallest rank whose Hankel singular values hold the fraction 1 - tau of their sum (of sigma, not squared).

    Args:
        tau: fraction discarded, 0 <= tau < 1; 0 keeps everything.
        keep: the same said the other way, 1 - tau; give exactly one of the two.
        multiple_of: ranks are rounded up to a multiple of this (tensor-core sizes); None takes the Compressor's.
        gate: a layer is left alone unless its rank falls below ``gate`` times the present one (CompreSSM's 5 % rule).

    Source: CompreSSM (arXiv 2510.02823), algorithm 1.
    """

    tau: float | None = None
    keep: float | None = None
    multiple_of: int | None = None
    gate: float = GATE

    def __post_init__(self) -> None:
        if (self.tau is None) == (self.keep is None):
            got = f"tau={self.tau}, keep={self.keep}"
            raise bad_argument("tau, keep", got=got, expected="exactly one of the two (keep = 1 - tau)")
        if self.tau is None:
            _check_number("keep", self.keep, "a number in (0, 1]", lambda value: 0 < value <= 1)
            object.__setattr__(self, "tau", 1 - self.keep)
        else:
            _check_number("tau", self.tau, "a number in [0, 1)", lambda value: 0 <= value < 1)
            object.__setattr__(self, "keep", 1 - self.tau)
        _check_rounding(self.multiple_of, self.gate)

    @property
    def budget(self) -> float:
        return self.keep

    def gentler(self) -> Energy:
        """Half of tau."""
        return replace(self, tau=self.tau / 2, keep=None)

    def rank(self, spectrum: LayerSpectrum, multiple_of: int = 1) -> int:
        spectrum.check()
        tau = self.tau if spectrum.keep is None else 1 - spectrum.keep
        order, multiple = energy_order(spectrum.hsv, tau), self.multiple_of or multiple_of
        least = _round_and_gate(slots(order, spectrum.convention), spectrum.rank, multiple, self.gate)
        if least == spectrum.rank:
            return least
        return _round_and_gate(spectrum.slots(order), spectrum.rank, multiple, self.gate)


@dataclass(frozen=True)
class FixedRank(Policy):
    """Cut every layer to a given number of states, or layers by name; layers that have no more are left alone.

    Args:
        ranks: one positive number for all layers, or ``{module name: number}`` (layers not named stay).
    """

    ranks: int | Mapping[str, int]

    def __post_init__(self) -> None:
        if isinstance(self.ranks, Mapping):
            object.__setattr__(self, "ranks", dict(self.ranks))
        named = self.ranks.items() if isinstance(self.ranks, dict) else [("rank", self.ranks)]
        for name, value in named:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise bad_argument(f"FixedRank {name}", got=repr(value), expected="a positive integer")

    def check_layers(self, ranks: Mapping[str, int]) -> None:
        if isinstance(self.ranks, dict) and (unknown := sorted(set(self.ranks) - set(ranks))):
            expected = f"names of state-space layers of the model: {', '.join(ranks)}"
            raise bad_argument("FixedRank", got=", ".join(unknown), expected=expected)

    def rank(self, spectrum: LayerSpectrum, multiple_of: int = 1) -> int:
        wanted = self.ranks.get(spectrum.name, spectrum.rank) if isinstance(self.ranks, dict) else self.ranks
        if wanted >= spectrum.rank:
            return spectrum.rank
        spectrum.check()
        return wanted


@dataclass(frozen=True)
class Shrink(Policy):
    """Remove a fraction of the states at every attempt, whatever the spectrum.

    Args:
        fraction: part of the present states to remove, in (0, 1); 0.5 halves the state.
        multiple_of, gate: as in :class:`Energy`.
    """

    fraction: float
    multiple_of: int | None = None
    gate: float = GATE

    def __post_init__(self) -> None:
        _check_number("fraction", self.fraction, "a number in (0, 1)", lambda value: 0 < value < 1)
        _check_rounding(self.multiple_of, self.gate)

    def rank(self, spectrum: LayerSpectrum, multiple_of: int = 1) -> int:
        spectrum.check()
        wanted = max(1, math.ceil(spectrum.rank * (1 - self.fraction) - 1e-9))
        return _round_and_gate(wanted, spectrum.rank, self.multiple_of or multiple_of, self.gate)

    def gentler(self) -> Shrink:
        """Half of the fraction."""
        return replace(self, fraction=self.fraction / 2)


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
    tail = torch.flip(torch.cumsum(torch.flip(hsv.double(), (0,)), 0), (0,))  # tail[m] = sum of hsv[m:]
    return max(1, int((tail > tau * tail[0]).sum()))


def _round_and_gate(wanted: int, rank: int, multiple_of: int, gate: float) -> int:
    rounded = min(rank, max(1, -(-wanted // multiple_of) * multiple_of))
    return rounded if rounded < gate * rank else rank


def _check_number(name: str, value: object, expected: str, allowed) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not allowed(value):
        raise bad_argument(name, got=repr(value), expected=expected)


def _check_rounding(multiple_of: int | None, gate: float) -> None:
    _check_number("gate", gate, "a number in (0, 1]", lambda value: 0 < value <= 1)
    check_multiple(multiple_of)


def check_multiple(multiple_of: int | None) -> None:
    """Raise ArgumentError unless None or a positive integer."""
    if multiple_of is not None and (isinstance(multiple_of, bool) or not isinstance(multiple_of, int) or multiple_of < 1):
        raise bad_argument("multiple_of", got=repr(multiple_of), expected="a positive integer")
