"""Pairs of channels that turn with their position: channel j of a head together with channel j + K / 2, all heads alike.

The buffer ``inv_freq`` (K / 2,) says how far each turns in a step: of our own layers, or of flash-linear-attention's rotary
embedding, the sub-module ``rotary``.  Both compute it from K and leave it out of checkpoints.  Where some pairs are left, they
turn as before: then the buffer is part of checkpoints, which a new layer of that size refuses in torch's own
``load_state_dict``, and :class:`KeptFrequencies` keeps the library from computing it anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressm.layers.linear_attention import turn

Mixer = Any  # a module with such a buffer
BUFFER = "inv_freq"
EMBEDDING = "rotary"


class KeptFrequencies(nn.Module):
    """In front of a rotary embedding's class: its frequencies are a buffer, and nothing else knows them."""

    inv_freq: Tensor
    _cos_cached: Tensor | None
    _made_of: tuple[Tensor, int] | None = None

    def reset_parameters(self) -> None:
        """Nothing: what other pairs would turn by is no better."""

    def _compute_inv_freq(self, device: torch.device | None = None) -> Tensor:
        return self.inv_freq.to(device, torch.float32)

    def _update_cos_sin_cache(self, seqlen: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """The library's, from the start where the frequencies are others than those that it holds."""
        if not self.inv_freq.is_inference() and not torch.compiler.is_compiling():
            made_of = self.inv_freq, self.inv_freq._version
            if self._made_of is None or self._made_of[0] is not made_of[0] or self._made_of[1] != made_of[1]:
                self._cos_cached, self._made_of = None, made_of
        own: Any = super()
        own._update_cos_sin_cache(seqlen, device=device, dtype=dtype)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> KeptFrequencies:
        """Half precision cannot tell them from others."""
        before = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype.itemsize < 4:
            self._buffers[BUFFER] = before.to(self.inv_freq.device, torch.float32)
        return self


@functools.cache
def _kept(kind: Any) -> type[nn.Module]:
    return type(kind.__name__, (KeptFrequencies, kind), {"__module__": kind.__module__})


def turning(mixer: Mixer) -> bool:
    """Whether queries and keys turn with their position."""
    return getattr(mixer, BUFFER, None) is not None or getattr(mixer, EMBEDDING, None) is not None


def obstacle(mixer: Mixer) -> str:
    """Why a layer's pairs cannot become fewer, in words; empty: they can."""
    own = _owner(mixer)
    turn_by = f"queries and keys turn with their position by a {type(own).__name__}"
    if own is mixer:
        return ""
    if not isinstance(own._buffers.get(BUFFER), Tensor) or not hasattr(own, "base"):
        return f"{turn_by}, expected one with a buffer {BUFFER} and a base"
    if getattr(own, "interleaved", False) or getattr(own, "scale", None) is not None:
        return f"{turn_by} of neighbouring channels or with a scale (xPos), expected neither"
    return ""


def frequencies(mixer: Mixer) -> Tensor:
    """(K / 2,) float32 at least."""
    own = _owner(mixer)
    found: Tensor = own.inv_freq
    return found if found.dtype.itemsize >= 4 else own._compute_inv_freq(device=found.device)


def turned(mixer: Mixer, x: Tensor) -> Tensor:
    """x (batch, L, heads, K), turned by the positions."""
    return turned_by(x, frequencies(mixer))


def turned_by(x: Tensor, frequencies: Tensor) -> Tensor:
    """The same by frequencies (K / 2,)."""
    return turn(x, torch.arange(x.shape[1], device=x.device)[:, None, None] * frequencies.to(x.device))


def attributes(mixer: Mixer, rank: int) -> dict[str, Any]:
    """Those of a layer that is built with ``rank`` channels; where its frequencies are kept ones, room for those."""
    own = _owner(mixer)
    exponents = torch.arange(0, rank, 2, device=own.inv_freq.device, dtype=torch.float32) / rank
    return _named(mixer, getattr(own, _base(mixer)) ** -exponents, rank, type(own), own._non_persistent_buffers_set)


def kept(mixer: Mixer, pairs: Tensor) -> dict[str, Any]:
    """Attributes of the layer of some of its pairs."""
    left = frequencies(mixer).index_select(0, pairs.to(frequencies(mixer).device))
    return _named(mixer, left, 2 * len(pairs), *_keeping(mixer))


def kept_frequencies(mixer: Mixer, attributes: Mapping[str, Any]) -> Tensor | None:
    """Those among the attributes of :func:`kept`; None of a layer that does not turn."""
    return attributes[_name(mixer, BUFFER)] if turning(mixer) else None


def as_stored(mixer: Mixer, names: Collection[str]) -> dict[str, Any]:
    """Attributes of a layer of the same size that has the buffer in its checkpoints if it is among their names.

    Empty where it has, or has not, as it is.
    """
    own, stored = _owner(mixer), _name(mixer, BUFFER) in names
    if stored == (BUFFER not in own._non_persistent_buffers_set):
        return {}
    if stored:
        return _named(mixer, own.inv_freq, 2 * len(own.inv_freq), *_keeping(mixer))
    kind = type(own).__mro__[2] if isinstance(own, KeptFrequencies) else type(own)  # behind ours
    return attributes(mixer, 2 * len(own.inv_freq)) | _named_kind(mixer, kind, {*own._non_persistent_buffers_set, BUFFER})


def _keeping(mixer: Mixer) -> tuple[type[nn.Module], set[str]]:
    own = _owner(mixer)
    kind: Any = type(own)
    kind = kind if own is mixer or isinstance(own, KeptFrequencies) else _kept(kind)
    return kind, own._non_persistent_buffers_set - {BUFFER}


def _owner(mixer: Mixer) -> Any:
    embedding = getattr(mixer, EMBEDDING, None)
    return mixer if embedding is None else embedding


def _base(mixer: Mixer) -> str:
    return "rotary_base" if _owner(mixer) is mixer else "base"


def _name(mixer: Mixer, leaf: str) -> str:
    return leaf if _owner(mixer) is mixer else f"{EMBEDDING}.{leaf}"


def _named(mixer: Mixer, values: Tensor, rank: int, kind: type[nn.Module], left_out: set[str]) -> dict[str, Any]:
    found = {_name(mixer, BUFFER): values, **_named_kind(mixer, kind, left_out)}
    if _owner(mixer) is not mixer:
        found |= {f"{EMBEDDING}.dim": rank, f"{EMBEDDING}._cos_cached": None}
    return found


def _named_kind(mixer: Mixer, kind: type[nn.Module], left_out: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = {_name(mixer, "_non_persistent_buffers_set"): set(left_out)}
    return found if _owner(mixer) is mixer else {**found, f"{EMBEDDING}.__class__": kind}
