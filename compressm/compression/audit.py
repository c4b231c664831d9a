"""Checks that model, optimizers and EMA copy belong together, before and after surgery."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor, nn

from compressm.adapters import Adapter
from compressm.adapters.base import holder, parameter_at, plain_parameters
from compressm.errors import ArgumentError, ModelError, OptimizerError, bad_argument

Optimizers = Sequence[torch.optim.Optimizer]
Ema = nn.Module | MutableMapping[str, Tensor]
ELEMENTWISE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def full_name(layer: str, key: str) -> str:
    """Name of a layer's parameter in the model."""
    return f"{layer}.{key}" if layer else key


def check_optimizers(layers: Mapping[str, tuple[nn.Module, Adapter]], model: nn.Module, optimizers: Optimizers) -> None:
    """The optimizers must hold every trainable parameter of the state-space layers, once.

    Raises:
        OptimizerError: they do not; names the parameters.
        ArgumentError: not an optimizer.
    """
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise bad_argument("optimizer", got=type(optimizer).__name__, expected="a torch.optim.Optimizer")
    counts = held_counts(optimizers)
    missing = [
        full_name(name, key)
        for name, (module, adapter) in layers.items()
        for key in adapter.parameters(module)
        if (p := parameter_at(module, key)) is not None and p.requires_grad and not counts.get(id(p))
    ]
    if missing:
        raise OptimizerError(
            f"optimizer: does not hold {len(missing)} trainable parameters of the model's state-space layers "
            f"({', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}), expected all of them. Build the optimizer "
            "from this model's parameters, after moving it to its device, or set requires_grad=False on frozen ones"
        )
    audit(model, optimizers)


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


def check_ema(ema: Ema, model: nn.Module, layers: Mapping[str, tuple[nn.Module, Adapter]]) -> None:
    """The EMA copy must hold every parameter that reductions replace, in its present shape.

    Raises:
        ArgumentError: it does not, or it is the model itself.
    """
    if ema is model:
        raise bad_argument("ema", got="the model itself", expected="a separate averaged copy")
    for name, (module, adapter) in layers.items():
        for key in adapter.parameters(module):
            slot, leaf = ema_slot(ema, name, key)
            value, shape = slot.get(leaf), parameter_at(module, key).shape
            if value is None or value.shape != shape:
                got = "nothing" if value is None else f"shape {tuple(value.shape)}"
                expected = f"{full_name(name, key)} of shape {tuple(shape)}"
                raise bad_argument("ema", got=got, expected=expected, remedy="Build the copy from the model as it is now")


def ema_slot(ema: Ema, layer: str, key: str) -> tuple[MutableMapping[str, Tensor], str]:
    """Where a layer's tensor lies in an EMA copy: the dict itself or the owning submodule's parameters, and the name there."""
    if isinstance(ema, MutableMapping):
        return ema, full_name(layer, key)
    try:
        owner, leaf = holder(ema_layer(ema, layer), key)
    except AttributeError as error:
        raise ArgumentError(f"ema: has no submodule {layer!r} with {key}, expected the structure of the model") from error
    return owner._parameters, leaf


def ema_layer(ema: nn.Module, layer: str) -> nn.Module:
    """A layer's copy in an averaged module.

    Raises:
        ArgumentError: not a module; AttributeError: it has no such submodule.
    """
    if not isinstance(ema, nn.Module):
        raise bad_argument("ema", got=type(ema).__name__, expected="an nn.Module or a dict of parameter names to tensors")
    root = ema.module if isinstance(ema, torch.optim.swa_utils.AveragedModel) else ema
    return root.get_submodule(layer)


def held_counts(optimizers: Optimizers) -> dict[int, int]:
    """How many times each parameter, by id, occurs in the optimizers' groups."""
    counts: dict[int, int] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts


def trained_names(model: nn.Module, optimizers: Optimizers) -> frozenset[str]:
    """Names of the model's parameters that the optimizers hold."""
    counts = held_counts(optimizers)
    return frozenset(name for name, p in model.named_parameters() if counts.get(id(p)))


def audit(
    model: nn.Module, optimizers: Optimizers, *, trained: frozenset[str] = frozenset(), dead: Iterable[Tensor] = ()
) -> None:
    """Prove that optimizers and model belong together.

    Args:
        trained: names of parameters that must be held (those held before a reduction).
        dead: tensors that must not be referenced any more.

    Raises:
        OptimizerError: a parameter is held twice or not any more, a dead tensor is referenced, state belongs to no
            parameter of the groups, or element-wise state has another shape than its parameter.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    counts = held_counts(optimizers)
    for key, count in counts.items():
        if count > 1:
            which = names.get(key, "(not in the model)")
            raise OptimizerError(f"optimizer: parameter {which} is in {count} parameter groups, expected one")
    if lost := sorted(trained - trained_names(model, optimizers)):
        raise OptimizerError(f"optimizer: lost {', '.join(lost)}, expected every trained parameter in one group")
    dead_ids = {id(tensor) for tensor in dead}
    if dead_ids & counts.keys():
        raise OptimizerError("optimizer: still holds a replaced parameter, expected only living ones")
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            if not isinstance(parameter, Tensor):
                continue
            if id(parameter) not in counts:
                raise OptimizerError(
                    f"optimizer: holds state for a tensor of shape {tuple(parameter.shape)} that is in none of its "
                    "groups, expected none. Delete optimizer.state[that tensor]"
                )
            for key in ELEMENTWISE:
                value = state.get(key)
                if isinstance(value, Tensor) and value.shape != parameter.shape:
                    raise OptimizerError(
                        f"optimizer: state {key} of {names.get(id(parameter), 'a parameter')} has shape "
                        f"{tuple(value.shape)}, expected {tuple(parameter.shape)}"
                    )
