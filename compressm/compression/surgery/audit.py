"""Checks that model, optimizers and EMA copy belong together, before and after surgery."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters.parameters import holder, own_parameter, parameter_at, plain_parameters
from compressm.compression.common.models import Layers
from compressm.compression.surgery.optimizer_state import held_parameters, masters_of, shaped_keys
from compressm.errors import ArgumentError, ModelError, OptimizerError, bad_argument

Optimizers = Sequence[torch.optim.Optimizer]
OptimizerArgument = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None
Ema = nn.Module | MutableMapping[str, Tensor]
Signature = Mapping[tuple[int, str, str], tuple[torch.dtype, torch.device]]


def full_name(layer: str, key: str) -> str:
    """Name of a layer's parameter in the model."""
    return f"{layer}.{key}" if layer else key


def as_optimizers(
    optimizer: OptimizerArgument,
) -> tuple[torch.optim.Optimizer, ...]:
    """None, one or several optimizers as a tuple.

    Raises:
        ArgumentError: anything else.
    """
    if optimizer is None:
        return ()
    listed = tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
    for item in listed:
        if not isinstance(item, torch.optim.Optimizer):
            raise bad_argument("optimizer", got=type(item).__name__, expected="a torch.optim.Optimizer or a list of them")
    return listed


def check_optimizers(layers: Layers, model: nn.Module, optimizers: Optimizers) -> None:
    """Optimizers, where there are any, hold every trainable parameter of the state-space layers, once, or its master copy.

    Raises:
        OptimizerError: they do not; names the parameters.
        ArgumentError: not an optimizer.
    """
    if not optimizers:
        return
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise bad_argument("optimizer", got=type(optimizer).__name__, expected="a torch.optim.Optimizer")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise OptimizerError(
                "optimizer: LBFGS keeps one flat history of all parameters, expected an optimizer with state per parameter. "
                "Compress before or after training with it"
            )
    counts, held = held_counts(optimizers), held_tensors(model, optimizers)
    missing = {
        full_name(name, key): p
        for name, (module, adapter) in layers.items()
        for key in adapter.parameters(module)
        if (p := parameter_at(module, key)) is not None
        and p.requires_grad
        and not counts.get(id(held.get(full_name(name, key), p)))
    }
    if missing:
        names = list(missing)
        raise OptimizerError(
            f"optimizer: does not hold {len(missing)} trainable parameters of the model's state-space layers "
            f"({', '.join(names[:4])}{', ...' if len(missing) > 4 else ''}), expected all of them. "
            f"{_strangers(model, optimizers, missing)}Build the optimizer "
            "from this model's parameters, after moving it to its device, or set requires_grad=False on frozen ones"
        )
    audit(model, optimizers)


def _strangers(model: nn.Module, optimizers: Optimizers, missing: Mapping[str, Tensor]) -> str:
    """What the optimizers hold instead of the missing parameters."""
    known = {id(p) for p in held_tensors(model, optimizers).values()}
    shapes = {p.shape for p in missing.values()}
    strange = [p for o in optimizers for p in held_parameters(o) if id(p) not in known and p.shape in shapes]
    if not strange:
        return ""
    kinds = ", ".join(sorted({f"{p.dtype} on {p.device}".removeprefix("torch.") for p in strange}))
    return (
        f"It holds {len(strange)} tensors of such shapes ({kinds}) that are not this model's: it was built for another "
        "model, or before .to(), .to_empty() or a wrapper replaced the parameters; if they are master copies in higher "
        "precision, say so with compressm.compression.attach_masters. "
    )


def check_swappable(model: nn.Module, targets: Mapping[str, tuple[nn.Module, Iterable[str]]]) -> None:
    """Refuse parameters that cannot be replaced without breaking something silently.

    Args:
        targets: per layer name the module and the local names of the parameters to replace.

    Raises:
        ModelError: a parameter is shared between modules, carries gradient hooks, is computed (parametrized, pruned) or is
            not a plain Parameter.
    """
    owners: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(full_name(prefix, key))
    for name, (module, keys) in targets.items():
        for key, parameter in plain_parameters(module, tuple(keys), name).items():
            full = full_name(name, key)
            if len(owners.get(id(parameter), ())) > 1:
                raise ModelError(
                    f"parameter {full} is shared ({', '.join(owners[id(parameter)])}), expected every state-space layer "
                    "to own its parameters. Share the whole layer module instead, or give each layer a copy"
                )
            if type(parameter) is not nn.Parameter:
                kind = type(parameter).__name__
                raise ModelError(f"parameter {full} is a {kind}, expected a plain torch.nn.Parameter. Unshard it first")
            if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
                raise ModelError(
                    f"parameter {full} carries gradient hooks, which would be lost when it is replaced. Remove them "
                    "before the reduction and register them again on the new parameter"
                )


def check_ema(ema: Ema, model: nn.Module, layers: Layers) -> None:
    """The EMA copy must hold every parameter that reductions replace, in its present shape.

    Raises:
        ArgumentError: it does not, or it is the model itself.
    """
    if ema is model:
        raise bad_argument("ema", got="the model itself", expected="a separate averaged copy")
    for name, (module, adapter) in layers.items():
        for key in adapter.parameters(module):
            slot, leaf = ema_slot(ema, name, key)
            live = own_parameter(module, key)
            value, shape = slot.get(leaf), live.shape
            if value is None or value.shape != shape:
                got = "nothing" if value is None else f"shape {tuple(value.shape)}"
                expected = f"{full_name(name, key)} of shape {tuple(shape)}"
                raise bad_argument("ema", got=got, expected=expected, remedy="Build the copy from the model as it is now")
            if value is live or (value.device == live.device and value.data_ptr() == live.data_ptr() != 0):
                got, remedy = f"the live {full_name(name, key)}", "Clone the parameters into the copy"
                raise bad_argument("ema", got=got, expected="a copy with its own memory", remedy=remedy)


def ema_slot(ema: Ema, layer: str, key: str) -> tuple[MutableMapping[str, Any], str]:
    """Where a layer's tensor lies in an EMA copy: the dict itself or the owning submodule's parameters, and the name there."""
    if isinstance(ema, MutableMapping):
        return ema, full_name(layer, key)
    try:
        owner, leaf = holder(ema_layer(ema, layer), key)
    except AttributeError as error:
        raise ArgumentError(f"ema: has no submodule {layer!r} with {key}, expected the structure of the model") from error
    return owner._parameters, leaf


def ema_layer(ema: Ema | None, layer: str) -> nn.Module:
    """A layer's copy in an averaged module.

    Raises:
        ArgumentError: not a module; AttributeError: it has no such submodule.
    """
    if not isinstance(ema, nn.Module):
        raise bad_argument("ema", got=type(ema).__name__, expected="an nn.Module or a dict of parameter names to tensors")
    root = ema.module if isinstance(ema, torch.optim.swa_utils.AveragedModel) else ema
    return root.get_submodule(layer)


def held_counts(optimizers: Optimizers) -> Mapping[int, int]:
    """How many times each parameter, by id, occurs in the optimizers' groups."""
    return Counter(id(parameter) for optimizer in optimizers for parameter in held_parameters(optimizer))


def held_tensors(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """Parameter name to what optimizers hold of it if they do: its master copy where there is one, else itself."""
    return {**dict(model.named_parameters()), **masters_of(optimizers)}


def trained_names(model: nn.Module, optimizers: Optimizers) -> frozenset[str]:
    """Names of the model's parameters that the optimizers hold."""
    counts = held_counts(optimizers)
    return frozenset(name for name, p in held_tensors(model, optimizers).items() if counts.get(id(p)))


def signature(model: nn.Module, optimizers: Optimizers) -> Signature:
    """Dtype and device of every tensor in the optimizers' state, by optimizer, parameter and key."""
    names = {id(p): name for name, p in held_tensors(model, optimizers).items()}
    return {
        (index, names[id(p)], key): (value.dtype, value.device)
        for index, optimizer in enumerate(optimizers)
        for p, state in optimizer.state.items()
        if id(p) in names
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def audit(
    model: nn.Module,
    optimizers: Optimizers,
    *,
    trained: frozenset[str] = frozenset(),
    dead: Iterable[Tensor] = (),
    before: Signature | None = None,
) -> None:
    """Prove that optimizers and model belong together.

    Args:
        trained: names of parameters that must be held (those held before a reduction).
        dead: tensors that must not be referenced any more, in groups, state or any other attribute of the optimizers.
        before: signature of the state before a reduction; what is left of it must have the same dtypes and devices.

    Raises:
        OptimizerError: a parameter is held twice or not any more, a dead tensor is referenced, state belongs to no
            parameter of the groups, or element-wise state has another shape than its parameter, another dtype or device
            than before.
    """
    names = {id(p): name for name, p in held_tensors(model, optimizers).items()}
    counts = held_counts(optimizers)
    for key, count in counts.items():
        if count > 1:
            which = names.get(key, "(not in the model)")
            raise OptimizerError(f"optimizer: parameter {which} is in {count} parameter groups, expected one")
    if lost := sorted(trained - trained_names(model, optimizers)):
        raise OptimizerError(f"optimizer: lost {', '.join(lost)}, expected every trained parameter in one group")
    dead_ids = {id(tensor) for tensor in dead}
    for optimizer in optimizers:
        if dead_ids and (path := next(_paths_to(vars(optimizer), dead_ids), None)):
            raise OptimizerError(
                f"optimizer: {type(optimizer).__name__}{path} still holds a replaced parameter, expected only living ones. "
                "An optimizer that keeps parameters outside param_groups and state cannot follow a reduction"
            )
        _audit_state(optimizer, names, counts)
    now = signature(model, optimizers)
    for place, (dtype, device) in (before or {}).items():
        if place in now and now[place] != (dtype, device):
            _, name, slot = place
            got = " on ".join(map(str, now[place]))
            raise OptimizerError(f"optimizer: state {slot} of {name} became {got}, expected {dtype} on {device} as before")


def _audit_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str], counts: Mapping[int, int]) -> None:
    """State must belong to parameters in the groups, and have their shape where it is element-wise."""
    shaped = shaped_keys(optimizer)
    for parameter, state in optimizer.state.items():
        if not isinstance(parameter, Tensor):
            continue
        if id(parameter) not in counts:
            raise OptimizerError(
                f"optimizer: holds state for a tensor of shape {tuple(parameter.shape)} that is in none of its "
                "groups, expected none. Delete optimizer.state[that tensor]"
            )
        for key in shaped & state.keys():
            value = state[key]
            if isinstance(value, Tensor) and value.shape != parameter.shape:
                raise OptimizerError(
                    f"optimizer: state {key} of {names.get(id(parameter), 'a parameter')} has shape "
                    f"{tuple(value.shape)}, expected {tuple(parameter.shape)}"
                )


def _paths_to(value: Any, ids: set[int], path: str = "", seen: set[int] | None = None) -> Iterator[str]:
    """Where one of some tensors lies in a tree of containers, tensors as keys included, and optimizers inside them."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        if id(value) in ids:
            yield path
        return
    if isinstance(value, torch.optim.Optimizer):
        value = vars(value)
    if not isinstance(value, Mapping | list | tuple | set) or id(value) in seen:
        return
    seen.add(id(value))
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        if isinstance(key, Tensor) and id(key) in ids:
            yield f"{path}[a parameter]"
        label = repr(key) if isinstance(key, str | int) else "a parameter"
        yield from _paths_to(item, ids, f"{path}[{label}]", seen)


def audit_ema(ema: Ema, model: nn.Module, layers: Layers, dead: Iterable[Tensor]) -> None:
    """Prove that an averaged copy has followed a reduction.

    Raises:
        ArgumentError: a value has another shape than the live parameter or is it, or a replaced tensor is still there.
    """
    check_ema(ema, model, layers)
    dead_ids = {id(tensor) for tensor in dead}
    values = ema.items() if isinstance(ema, MutableMapping) else ema.named_parameters()
    for name, value in values:
        if id(value) in dead_ids:
            raise bad_argument("ema", got=f"a replaced parameter under {name!r}", expected="only living ones")
