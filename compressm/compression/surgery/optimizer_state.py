"""What the pieces of an optimizer's state are: gradients, squared gradients, copies of the parameter, by optimizer class."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters.registry import qualified_name
from compressm.errors import OptimizerError, bad_argument

FIRST = "first"
SECOND = "second"
MAGNITUDE = "magnitude"
ROWS = "second-rows"
COLUMNS = "second-columns"
VALUE = "value"
MASTER = "master"
ZERO = "zero"
KEEP = "keep"
KINDS: Mapping[str, str] = MappingProxyType(
    {
        FIRST: "a gradient, or a sum or average of gradients (Adam's exp_avg, momentum)",
        SECOND: "squared gradients (Adam's exp_avg_sq)",
        MAGNITUDE: "absolute gradients (Adamax's exp_inf)",
        ROWS: "squared gradients, averaged over the last dimension (Adafactor's row_var)",
        COLUMNS: "squared gradients, averaged over the last dimension but one (Adafactor's col_var)",
        VALUE: "another copy of the parameter (an average of it)",
        MASTER: "the parameter itself in higher precision, which the optimizer copies into it",
        ZERO: "anything that may begin at zero again",
        KEEP: "anything that does not depend on the parameter's shape or basis",
    }
)
SHAPED = (FIRST, SECOND, MAGNITUDE, VALUE, MASTER, ZERO)  # kinds of state that have their parameter's shape
_ADAM = {"exp_avg": FIRST, "exp_avg_sq": SECOND}
_TABLES: dict[str, dict[str, str]] = {}


def register_optimizer_state(target: str | type, kinds: Mapping[str, str]) -> None:
    """Say what an optimizer keeps per parameter, so that it can be carried through a change of basis.

    Subclasses inherit it, and may add to it or change it.  State under keys that nobody named makes a replaced parameter
    start afresh, with an UnknownStateWarning.

    Args:
        target: the optimizer class, or its qualified name such as ``"lion_pytorch.lion_pytorch.Lion"``.
        kinds: key in ``optimizer.state[parameter]`` to one of KINDS, for example ``{"exp_avg": "first"}``.

    Raises:
        ArgumentError: ``target`` is neither, or a kind is unknown.
    """
    if isinstance(target, type):
        target = qualified_name(target)
    if not isinstance(target, str) or "." not in target:
        raise bad_argument("target", got=repr(target), expected="a class or a qualified name like 'package.module.Class'")
    if not isinstance(kinds, Mapping):
        raise bad_argument("kinds", got=repr(kinds), expected="a mapping of state keys to kinds")
    for key, kind in kinds.items():
        if kind not in KINDS:
            raise bad_argument(f"kinds[{key!r}]", got=repr(kind), expected=f"one of {', '.join(KINDS)}")
    if len({ROWS, COLUMNS} & set(kinds.values())) == 1 or max(map([*kinds.values()].count, (ROWS, COLUMNS))) > 1:
        raise bad_argument("kinds", got=repr(dict(kinds)), expected=f"one {ROWS!r} and one {COLUMNS!r} together, or neither")
    _TABLES[target] = dict(kinds)


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer itself behind wrappers (accelerate's) that have one as ``optimizer``; they lack its hooks."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def state_kinds(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Key of per-parameter state to its kind, for an optimizer or a wrapper with one as ``optimizer``."""
    inner = vars(optimizer).get("optimizer")
    kinds: dict[str, str] = state_kinds(inner) if isinstance(inner, torch.optim.Optimizer) else {}
    for cls in reversed(type(optimizer).__mro__):
        kinds |= _TABLES.get(qualified_name(cls), {})
    return kinds


def shaped_keys(optimizer: torch.optim.Optimizer) -> frozenset[str]:
    """Keys of state that has its parameter's shape: those of Adam and SGD in any optimizer, and what its own kinds say."""
    common = {**_ADAM, "max_exp_avg_sq": SECOND, "momentum_buffer": FIRST}
    return frozenset(key for key, kind in (common | state_kinds(optimizer)).items() if kind in SHAPED)


def needed_keys(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> frozenset[str]:
    """What the state of a parameter in a group, if there is any, must hold; without it torch would fail later, or start anew
    in silence."""
    needed = {"max_exp_avg_sq"} if group.get("amsgrad") else set()
    if isinstance(optimizer, torch.optim.SGD):
        needed |= {"momentum_buffer"}
    if isinstance(optimizer, torch.optim.Adam | torch.optim.NAdam | torch.optim.RAdam):
        needed |= {"step", *_ADAM}
    return frozenset(needed)


def held_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters in the optimizer's groups, in their order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


for _name, _kinds in {
    "Adam": _ADAM | {"max_exp_avg_sq": SECOND},
    "AdamW": _ADAM | {"max_exp_avg_sq": SECOND},
    "NAdam": _ADAM,
    "RAdam": _ADAM,
    "Adamax": {"exp_avg": FIRST, "exp_inf": MAGNITUDE},
    "SGD": {"momentum_buffer": FIRST},
    "Muon": {"momentum_buffer": FIRST},
    "Adagrad": {"sum": SECOND},
    "RMSprop": {"square_avg": SECOND, "grad_avg": FIRST, "momentum_buffer": ZERO},
    "Adafactor": {"row_var": ROWS, "col_var": COLUMNS, "variance": SECOND},
    "ASGD": {"ax": VALUE},
}.items():
    if hasattr(torch.optim, _name):  # Muon came with torch 2.9
        register_optimizer_state(getattr(torch.optim, _name), _kinds)
register_optimizer_state("lion_pytorch.lion_pytorch.Lion", {"exp_avg": FIRST})
register_optimizer_state(
    "transformers.optimization.Adafactor",
    {"exp_avg_sq_row": ROWS, "exp_avg_sq_col": COLUMNS, "exp_avg_sq": SECOND, "exp_avg": FIRST},
)

Masters = MutableMapping[str, Tensor]
_MASTERS: weakref.WeakKeyDictionary[torch.optim.Optimizer, Masters] = weakref.WeakKeyDictionary()


def attach_masters(optimizer: torch.optim.Optimizer, model: nn.Module, masters: Masters) -> None:
    """Say that an optimizer trains float32 copies of a model's low-precision parameters, which follow every reduction.

    Call it before building the Compressor.  At a reduction the copies are carried through the change of basis in their own
    precision and the model gets their rounding; the new copies take the old ones' places in the optimizer's groups and in
    ``masters``, which the training loop must read anew in every step.

    Args:
        optimizer: its groups hold the values of ``masters``.
        model: the plain model.
        masters: parameter name, as in ``model.named_parameters()``, to its copy; a mutable mapping.

    Raises:
        ArgumentError, OptimizerError: a name is not the model's, a copy has another shape, or the optimizer does not hold it.
    """
    if not isinstance(masters, MutableMapping):
        raise bad_argument("masters", got=type(masters).__name__, expected="a mutable mapping of names to tensors")
    parameters = dict(model.named_parameters())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, master in masters.items():
        if name not in parameters:
            raise bad_argument("masters", got=repr(name), expected="names as in model.named_parameters()")
        if not isinstance(master, Tensor) or master.shape != parameters[name].shape:
            got = f"shape {tuple(master.shape)}" if isinstance(master, Tensor) else type(master).__name__
            raise bad_argument(f"masters[{name!r}]", got=got, expected=f"a tensor of shape {tuple(parameters[name].shape)}")
        if master is parameters[name]:
            raise bad_argument(f"masters[{name!r}]", got="the model's own parameter", expected="a copy of it")
        if id(master) not in held:
            raise OptimizerError(f"optimizer: does not hold masters[{name!r}], expected the copies in its groups")
    _MASTERS[optimizer] = masters


def masters_of(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Parameter name to the copy that one of the optimizers trains instead of it."""
    return {name: master for optimizer in optimizers for name, master in _MASTERS.get(optimizer, {}).items()}


def master_stores(optimizers: Sequence[torch.optim.Optimizer], name: str) -> list[Masters]:
    """The mappings given to :func:`attach_masters` that hold a parameter's copy."""
    return [store for optimizer in optimizers if name in (store := _MASTERS.get(optimizer, {}))]
