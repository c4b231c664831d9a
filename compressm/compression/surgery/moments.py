"""What happens to the optimizer's memory of a parameter that is replaced."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressm.adapters import LayerEdit
from compressm.adapters.parameters import wide
from compressm.compression.surgery.audit import Optimizers
from compressm.compression.surgery.optimizer_state import (
    COLUMNS,
    FIRST,
    KEEP,
    MAGNITUDE,
    MASTER,
    ROWS,
    SECOND,
    VALUE,
    ZERO,
    state_kinds,
)
from compressm.errors import bad_argument

MOMENTS = ("transport", "reset", "slice")
State = Mapping[str, Any]
_WARNED: weakref.WeakKeyDictionary[torch.optim.Optimizer, set[str]] = weakref.WeakKeyDictionary()


class UnknownStateWarning(UserWarning):
    """Optimizer state of a kind that cannot be carried through a change of basis was reset."""


def check_moments(moments: str) -> str:
    """The treatment of moments, if it is one of MOMENTS; ArgumentError otherwise."""
    if moments not in MOMENTS:
        raise bad_argument("moments", got=repr(moments), expected=f"one of {', '.join(MOMENTS)}")
    return moments


def new_states(
    optimizer: torch.optim.Optimizer,
    old: Mapping[str, Tensor],
    edit: LayerEdit,
    moments: str,
    optimizers: Optimizers = (),
) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """State of one layer's new parameters in one optimizer; mutates nothing.

    ``transport`` carries every piece of state as what it is (see ``optimizer_state.KINDS``): gradients by the transposed
    change of basis, squared gradients by its element-wise square, copies of the parameter like the parameter; it keeps
    ``step``.  Factored squared gradients are multiplied out, carried and averaged again, which keeps their row and column
    means exact within the factored model.  ``reset`` gives the parameter no state, so that the optimizer starts it at step
    0.  ``slice`` keeps the entries of the kept states where these are a subset of the old ones, else the leading entries
    (the CompreSSM authors' way, although the basis has changed).  State with the parameter's shape that is neither known
    nor sliced makes the parameter start afresh like ``reset``.  Dtype and device of every piece stay.

    Args:
        optimizer: holds the state of the ``old`` parameters.
        old: local name to old parameter (or the master copy trained instead of it), all those that change together, also
            those the optimizer does not hold.
        edit: how the layer changes.
        moments: one of MOMENTS.
        optimizers: all that train the layer; the moments that others hold of its parameters enter the transport.

    Returns:
        new state by local name (absent: the optimizer starts afresh), and the keys of unknown state that was dropped.
    """
    if moments == "reset":
        return {}, set()
    kinds = state_kinds(optimizer)
    states = {key: dict(optimizer.state[p]) for key, p in old.items() if optimizer.state.get(p)}
    unknown: set[str] = set()
    result: dict[str, dict[str, Any]] = {}
    for key, state in states.items():
        foreign = {name for name, value in state.items() if _foreign(value, old[key], kinds.get(name), moments)}
        unknown |= foreign
        if not foreign:
            result[key] = {name: value for name, value in state.items() if _stays(value, old[key], kinds.get(name))}
    elsewhere = {
        key: kept for other in optimizers if other is not optimizer for key, p in old.items() if (kept := other.state.get(p))
    }
    for piece in _pieces(kinds, states, old, moments):
        _carry(piece, {**elsewhere, **states}, result, old, edit, moments)
    return result, unknown


def warn_unknown(optimizer: torch.optim.Optimizer, keys: set[str]) -> None:
    """Tell, once per optimizer and key, that unknown state was reset."""
    if keys <= _WARNED.get(optimizer, set()):
        return
    kind = type(optimizer).__name__
    warnings.warn(
        f"{kind} keeps state ({', '.join(sorted(keys))}) that compressm cannot carry through a change of basis; it was reset "
        "for the parameters that were replaced, and the optimizer starts them afresh. Say what it is with "
        f"compressm.compression.register_optimizer_state({kind}, {{key: kind}}), or accept this with moments='reset'",
        UnknownStateWarning,
        stacklevel=4,
    )
    _WARNED.setdefault(optimizer, set()).update(keys)


@dataclass(frozen=True)
class _Piece:
    """One kind of state of all parameters of a layer: an entry in their shape, or its row and column means, or both.

    Attributes:
        kind: one of KINDS; None where nobody named it.
        name, rows, columns: keys of the state; empty for what it does not have.
    """

    kind: str | None
    name: str
    rows: str = ""
    columns: str = ""

    def read(self, state: State, parameter: Tensor) -> Tensor | None:
        """Float64 (complex128), in the parameter's shape; None if the parameter has no such state."""
        if isinstance(state.get(self.rows), Tensor):
            return _product(state[self.rows], state[self.columns], parameter.shape)
        value = state.get(self.name)
        return wide(value) if isinstance(value, Tensor) and _has_shape(value, parameter) else None

    def written(self, state: State, value: Tensor) -> dict[str, Tensor]:
        """The new state, in the form, dtype and device of the old one."""
        if not isinstance(state.get(self.rows), Tensor):
            return {self.name: value.to(state[self.name])}
        keep = state[self.rows].ndim == value.ndim
        rows, columns = value.mean(-1, keepdim=keep), value.mean(-2, keepdim=keep)
        return {self.rows: rows.to(state[self.rows]), self.columns: columns.to(state[self.columns])}


def _pieces(kinds: Mapping[str, str], states: Mapping[str, State], old: Mapping[str, Tensor], moments: str) -> Iterator[_Piece]:
    """What is to be carried; with ``slice`` also what nobody named."""
    named = {kind: key for key, kind in kinds.items()}
    seconds = [key for key, kind in kinds.items() if kind == SECOND]
    for key, kind in kinds.items():
        if kind in (FIRST, MAGNITUDE, VALUE, MASTER, ZERO):
            yield _Piece(kind, key)
    if ROWS in named:
        yield _Piece(SECOND, seconds[0] if seconds else "", named[ROWS], named[COLUMNS])
    for key in seconds[1 if ROWS in named else 0 :]:
        yield _Piece(SECOND, key)
    if moments == "slice":
        unnamed = {name for key, state in states.items() for name, value in state.items() if _has_shape(value, old[key])}
        yield from (_Piece(None, name) for name in sorted(unnamed - kinds.keys()))


def _carry(
    piece: _Piece,
    states: Mapping[str, State],
    result: dict[str, dict[str, Any]],
    old: Mapping[str, Tensor],
    edit: LayerEdit,
    moments: str,
) -> None:
    """Carry one kind of state of all the layer's parameters; parameters without it count as zero (copies: as they are).

    A parameter whose squared gradients vanish on the way (it follows from others that have none, frozen ones say) starts
    afresh: with a step count but no second moment Adam's next step would be several times too long.
    """
    held = {key: value for key, state in states.items() if (value := piece.read(state, old[key])) is not None}
    if not held.keys() & result.keys():
        return
    copies = piece.kind in (VALUE, MASTER)
    blank = {
        key: wide(old[key]) if copies else torch.zeros_like(wide(old[key])) for key in edit.tensors
    }
    carried = _carrier(piece.kind, edit, moments)({**blank, **held})
    for key in held.keys() & result.keys():
        vanished = piece.kind in (SECOND, MAGNITUDE) and bool(held[key].any()) and not bool(carried[key].any())
        if vanished and moments == "transport":
            del result[key]
        else:
            result[key] |= piece.written(states[key], carried[key])


def _carrier(kind: str | None, edit: LayerEdit, moments: str) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """How one kind of state follows."""
    if kind == ZERO:
        return lambda full: {key: full[key].new_zeros(edit.tensors[key].shape) for key in edit.tensors}
    if kind in (VALUE, MASTER):
        return edit.values
    if moments == "slice":
        return lambda full: {key: _sliced(edit, key, full[key]) for key in edit.tensors}
    if kind == MAGNITUDE:
        return lambda full: _by_parts(torch.sqrt, edit.second_moments(_by_parts(torch.square, full)))
    return edit.first_moments if kind == FIRST else edit.second_moments


def _by_parts(function: Callable[[Tensor], Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A real function of every number, of the real and the imaginary part of complex ones, as optimizers see them."""
    return {
        key: torch.view_as_complex(function(torch.view_as_real(value))) if value.is_complex() else function(value)
        for key, value in tensors.items()
    }


def _sliced(edit: LayerEdit, key: str, value: Tensor) -> Tensor:
    if edit.subset is not None:
        return edit.subset(key, value)
    return value[tuple(slice(0, size) for size in edit.tensors[key].shape)].clone()


def _product(rows: Tensor, columns: Tensor, shape: torch.Size) -> Tensor:
    """The matrix (or batch of them) of given row and column means that has rank one; the mean of either is its mean."""
    r, c = rows.detach().double().reshape(shape[:-1]), columns.detach().double().reshape(shape[:-2] + shape[-1:])
    mean = r.mean(-1)[..., None, None]
    return torch.where(mean > 0, r[..., :, None] * c[..., None, :] / mean.clamp_min(torch.finfo(mean.dtype).tiny), 0.0)


def _has_shape(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _stays(value: Any, parameter: Tensor, kind: str | None) -> bool:
    """Whether a piece of state is the same before and after."""
    return kind == KEEP or (kind not in (ROWS, COLUMNS) and not _has_shape(value, parameter))


def _foreign(value: Any, parameter: Tensor, kind: str | None, moments: str) -> bool:
    """Whether a piece of state can be neither kept as it is (scalars) nor carried."""
    if kind in (KEEP, ROWS, COLUMNS):
        return False
    if _has_shape(value, parameter):
        return kind is None and moments == "transport"
    if isinstance(value, Tensor):
        return value.numel() > 1
    return not (value is None or isinstance(value, bool | int | float | str))
