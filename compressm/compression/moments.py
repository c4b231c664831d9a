"""What happens to the optimizer's memory of a parameter that is replaced."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compressm.adapters import LayerEdit
from compressm.errors import bad_argument

MOMENTS = ("transport", "reset", "slice")

# State that is a gradient, or a squared gradient, of its parameter, by optimizer class.  Subclasses count; state under
# other keys is unknown to us even there.
FIRST = "first"
SECOND = "second"
KNOWN: tuple[tuple[type, Mapping[str, str]], ...] = (
    (torch.optim.Adam, {"exp_avg": FIRST, "exp_avg_sq": SECOND, "max_exp_avg_sq": SECOND}),
    (torch.optim.AdamW, {"exp_avg": FIRST, "exp_avg_sq": SECOND, "max_exp_avg_sq": SECOND}),
    (torch.optim.NAdam, {"exp_avg": FIRST, "exp_avg_sq": SECOND}),
    (torch.optim.RAdam, {"exp_avg": FIRST, "exp_avg_sq": SECOND}),
    (torch.optim.SGD, {"momentum_buffer": FIRST}),
)


class UnknownStateWarning(UserWarning):
    """Optimizer state of a kind that cannot be carried through a change of basis was reset."""


def check_moments(moments: str) -> None:
    """Raise ArgumentError unless one of MOMENTS."""
    if moments not in MOMENTS:
        raise bad_argument("moments", got=repr(moments), expected=f"one of {', '.join(MOMENTS)}")


def new_states(
    optimizer: torch.optim.Optimizer,
    old: Mapping[str, Tensor],
    edit: LayerEdit,
    moments: str,
    optimizers: Sequence[torch.optim.Optimizer] = (),
) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """State of one layer's new parameters in one optimizer; mutates nothing.

    ``transport`` carries gradient-like state by the transposed change of basis and squared gradients by its element-wise
    square, and keeps ``step``.  ``reset`` gives the parameter no state, so that the optimizer starts it at step 0.
    ``slice`` keeps the entries of the kept states where these are a subset of the old ones, else the leading entries (the
    CompreSSM authors' way, although the basis has changed).  State with the
    parameter's shape that is neither known nor sliced makes the parameter start afresh like ``reset``.

    Args:
        optimizer: holds the state of the ``old`` parameters.
        old: local name to old parameter, all those that change together (also those the optimizer does not hold).
        edit: how the layer changes.
        moments: one of MOMENTS.
        optimizers: all that train the layer; the moments that others hold of its parameters enter the transport.

    Returns:
        new state by local name (absent: the optimizer starts afresh), and the keys of unknown state that was dropped.
    """
    states = {key: dict(optimizer.state[p]) for key, p in old.items() if optimizer.state.get(p)}
    if moments == "reset":
        return {}, set()
    kinds = next((table for cls, table in KNOWN if isinstance(optimizer, cls)), {})
    unknown: set[str] = set()
    result: dict[str, dict[str, Any]] = {}
    for key, state in states.items():
        foreign = {name for name, value in state.items() if _foreign(value, name, old[key], kinds, moments)}
        unknown |= foreign
        if not foreign:
            result[key] = {name: value for name, value in state.items() if not _has_shape(value, old[key])}
    if moments == "slice":
        for key, state in result.items():
            window = tuple(slice(0, size) for size in edit.tensors[key].shape)
            for name, value in states[key].items():
                if name not in state:
                    state[name] = value[window].clone() if edit.subset is None else edit.subset(key, value)
        return result, unknown
    elsewhere = {
        key: state for other in optimizers if other is not optimizer for key, p in old.items() if (state := other.state.get(p))
    }
    for name, kind in kinds.items():
        _transport(name, kind, {**elsewhere, **states}, result, old, edit)
    return result, unknown


def warn_unknown(optimizer: torch.optim.Optimizer, keys: set[str]) -> None:
    """Tell once per call that unknown state was reset."""
    kind = type(optimizer).__name__
    warnings.warn(
        f"{kind} keeps state ({', '.join(sorted(keys))}) that compressm cannot carry through a change of basis; it was reset "
        "for the parameters that were replaced, and the optimizer starts them afresh. Pass moments='reset' to accept this",
        UnknownStateWarning,
        stacklevel=4,
    )


def _transport(
    name: str,
    kind: str,
    states: Mapping[str, Mapping[str, Any]],
    result: dict[str, dict[str, Any]],
    old: Mapping[str, Tensor],
    edit: LayerEdit,
) -> None:
    """Carry one kind of state of all the layer's parameters; parameters without it count as zero.

    A parameter whose squared gradients vanish on the way (it follows from others that have none, frozen ones say) starts
    afresh: with a step count but no second moment Adam's next step would be several times too long.
    """
    held = {key: state[name] for key, state in states.items() if _has_shape(state.get(name), old[key])}
    if not held.keys() & result.keys():
        return
    full = {
        key: held[key].detach().double() if key in held else torch.zeros_like(old[key], dtype=torch.float64)
        for key in edit.tensors
    }
    carry = edit.first_moments if kind == FIRST else edit.second_moments
    carried = carry(full)
    for key in held.keys() & result.keys():
        value = held[key]
        if kind == SECOND and bool(value.any()) and not bool(carried[key].any()):
            del result[key]
        else:
            result[key][name] = carried[key].to(value)


def _has_shape(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _foreign(value: Any, name: str, parameter: Tensor, kinds: Mapping[str, str], moments: str) -> bool:
    """Whether a piece of state can be neither kept as it is (scalars) nor carried."""
    if _has_shape(value, parameter):
        return moments == "transport" and name not in kinds
    if isinstance(value, Tensor):
        return value.numel() > 1
    return not (value is None or isinstance(value, bool | int | float | str))
