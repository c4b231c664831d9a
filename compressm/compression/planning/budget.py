"""Budget: a total over all layers, shared out by what each layer's cut costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise

from compressm.compression.planning.policies import Layer, LayerSpectrum, Policy
from compressm.errors import bad_argument, check_integer


@dataclass(frozen=True)
class Budget(Policy):
    """A total for all layers together; those keep more whose states carry more.

    What a layer's cut costs is the fraction of the sum of its Hankel singular values behind the cut (``discarded`` in reports,
    the tau of :class:`Energy`), every state of the real spectrum counting for two of its values.  Starting from all states,
    those go first whose removal costs least per state, or per byte, until the total is met: as the values of a spectrum
    descend, no other ranks that take no more than the answer's total have a smaller sum of costs over the layers.  Of equal
    costs the layer with more states pays, then the later one.  At most one step of the total stays unused.

    Ranks are multiples of the Compressor's ``multiple_of`` or what the layer has now, at least one multiple each; with
    ``uniform`` all layers take the largest rank at which the total is met.  Nothing changes where the layers have no more.
    A :class:`Rollback` that finds the cut too costly goes half-way back, and so beyond the budget.

    Args:
        states: ranks of all layers, summed.
        bytes: what the layers carry from one token to the next, per sequence (``Adapter.state_bytes``; the ``state_bytes`` of
            reports): recurrent states at their dtype, and a Mamba layer's convolution cache.  Give exactly one of the two.
    """

    _: KW_ONLY
    states: int | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        if (self.states is None) == (self.bytes is None):
            got = f"states={self.states}, bytes={self.bytes}"
            raise bad_argument("states, bytes", got=got, expected="exactly one of the two")
        check_integer(*(("bytes", self.bytes) if self.states is None else ("states", self.states)))

    def check_layers(self, layers: Mapping[str, Layer]) -> None:
        """Refuse a total below one multiple of states for every layer."""
        least = sum(self._price(layer)(_rungs(layer)[0]) for layer in layers.values())
        if least > self._total:
            unit = "bytes" if self.states is None else "states"
            multiples = sorted({layer.multiple_of for layer in layers.values()})
            each = "one state" if multiples == [1] else f"{' or '.join(map(str, multiples))} states (multiple_of)"
            expected = f"at least {least}, {each} for each of the {len(layers)} layers"
            raise bad_argument(f"Budget {unit}", got=str(self._total), expected=expected)

    def ranks(self, spectra: Mapping[str, LayerSpectrum]) -> dict[str, int]:
        now = {name: spectrum.rank for name, spectrum in spectra.items()}
        if self._taken(spectra, now) <= self._total:
            return now
        self.check_layers(spectra)
        for spectrum in spectra.values():
            spectrum.check()
        uniform = any(spectrum.uniform for spectrum in spectra.values())
        return self._uniform(spectra) if uniform else self._shares(spectra)

    @property
    def _total(self) -> int:
        (total,) = (given for given in (self.bytes, self.states) if given is not None)
        return total

    def _price(self, layer: Layer) -> Callable[[int], int]:
        """What a layer takes of the total at a rank."""
        if self.states is not None:
            return int
        if layer.state_bytes is None:
            remedy = "Give the spectrum its state_bytes, or budget states"
            raise bad_argument("bytes", got=f"layer {layer.name!r} without", expected="bytes of its state", remedy=remedy)
        return layer.state_bytes

    def _taken(self, layers: Mapping[str, Layer], ranks: Mapping[str, int]) -> int:
        return sum(self._price(layer)(ranks[name]) for name, layer in layers.items())

    def _uniform(self, spectra: Mapping[str, LayerSpectrum]) -> dict[str, int]:
        """The largest rank for all layers at which the total is met."""

        def ranks(rank: int) -> dict[str, int]:
            return {name: min(spectrum.rank, rank) for name, spectrum in spectra.items()}

        rungs = sorted({rung for spectrum in spectra.values() for rung in _rungs(spectrum)})
        return ranks(max(rung for rung in rungs if self._taken(spectra, ranks(rung)) <= self._total))

    def _shares(self, spectra: Mapping[str, LayerSpectrum]) -> dict[str, int]:
        """Steps up from the least ranks, the most valuable ones first, as far as the total goes."""
        ranks = {name: _rungs(spectrum)[0] for name, spectrum in spectra.items()}
        left = self._total - self._taken(spectra, ranks)
        for _, rank, _, size, name in sorted(step for place in enumerate(spectra.items()) for step in self._steps(*place)):
            if size > left:
                break
            ranks[name], left = rank, left - size
        return ranks

    def _steps(self, place: int, item: tuple[str, LayerSpectrum]) -> list[tuple[float, int, int, int, str]]:
        """(minus the value per size, rank after it, place of the layer, size, name) of each step up, the value falling."""
        name, spectrum = item
        values = spectrum.hsv.tolist()
        price, total = self._price(spectrum), self._scale(values)
        width = 2 if spectrum.convention == "real" else 1
        steps, worth = [], math.inf
        for low, high in pairwise(_rungs(spectrum)):
            size = price(high) - price(low)
            gain = math.fsum(values[width * low : width * high]) / total
            worth = min(worth, gain / size if size else math.inf)  # equal values may differ by their rounding
            steps.append((-worth, high, place, size, name))
        return steps


    def _scale(self, values: list[float]) -> float:
        """What a layer's values are compared with."""
        return math.fsum(values)


@dataclass(frozen=True)
class Largest(Budget):
    """A total for all layers together, for which the largest values of all spectra stay, whichever layer they belong to.

    As :class:`Budget`, but what a layer's cut costs is the sum of the values behind the cut itself, not its share of the
    layer's sum: for values that mean the same in all layers, as scores of ``compressm.control.LAST`` and ``AIRE`` do.
    """

    def _scale(self, values: list[float]) -> float:
        return 1.0


def _rungs(layer: Layer) -> list[int]:
    """The ranks that a layer may have, ascending: multiples, and what it has now."""
    return sorted({*range(layer.multiple_of, layer.rank, layer.multiple_of), layer.rank})
