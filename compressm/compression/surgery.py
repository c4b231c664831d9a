"""The one place that mutates: replaces parameters in model, optimizers and EMA copy together, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters import Adapter, LayerEdit
from compressm.compression.moments import new_states, warn_unknown
from compressm.errors import ArgumentError, ModelError, OptimizerError, bad_argument

Optimizers = Sequence[torch.optim.Optimizer]
Ema = nn.Module | MutableMapping[str, Tensor]
Action = Callable[[], None]


@dataclass(frozen=True)
class LayerTarget:
    """A layer together with the edit that it gets."""

    name: str
    module: nn.Module
    edit: LayerEdit

    def full_name(self, key: str) -> str:
        """Parameter name in the model."""
        return f"{self.name}.{key}" if self.name else key


def apply_edits(
    model: nn.Module, targets: Sequence[LayerTarget], optimizers: Optimizers = (), ema: Ema | None = None,
    *, moments: str = "transport",
) -> None:  # fmt: skip
    """Carry out all edits in model, optimizers and EMA, or none of them.

    New parameters keep ``requires_grad``, dtype, device and the attributes set on the old ones; they take the old ones'
    places in the optimizers' groups, whose objects stay the same.  Gradients of replaced parameters are dropped.

    Args:
        model: the plain model.
        targets: the layers and their edits.
        optimizers: that train the model's parameters.
        ema: a module of the same structure (``AveragedModel`` or a copy), or a dict of full parameter names to tensors; its
            values follow the same change of basis.
        moments: see ``moments.new_states``.

    Raises:
        ModelError, OptimizerError, ArgumentError, NumericalError: before anything has changed.
    """
    check_swappable(model, {t.name: (t.module, tuple(t.edit.tensors)) for t in targets})
    swaps = [(t, {key: _new_parameter(t.module._parameters[key], t.edit.tensors[key]) for key in t.edit.tensors}) for t in targets]
    old = [{key: t.module._parameters[key] for key in new} for t, new in swaps]
    actions: list[tuple[Action, Action]] = []
    for optimizer in optimizers:
        unknown: set[str] = set()
        states = []
        for (target, _), before in zip(swaps, old, strict=True):
            state, keys = new_states(optimizer, before, target.edit, moments)
            states.append(state)
            unknown |= keys
        if unknown:
            warn_unknown(optimizer, unknown)
        actions += _optimizer_actions(optimizer, [new for _, new in swaps], old, states)
    for (target, new), before in zip(swaps, old, strict=True):
        actions += [_assign(target.module._parameters, key, new[key], before[key]) for key in new]
    if ema is not None:
        actions += _ema_actions(ema, targets)
    _commit(actions, lambda: audit(model, optimizers))


def reshape(model: nn.Module, layers: Mapping[str, tuple[nn.Module, Adapter]], ranks: Mapping[str, int], optimizers: Optimizers) -> Action:
    """Give layers blank parameters of other ranks, in model and optimizers, as before loading a checkpoint.

    Returns:
        a function that undoes it.
    """
    swaps, old = [], []
    for name, rank in ranks.items():
        module, adapter = layers[name]
        if adapter.rank(module) != rank:
            blank = adapter.blank(module, rank)
            check_swappable(model, {name: (module, tuple(blank))})
            old.append({key: module._parameters[key] for key in blank})
            swaps.append((module, {key: _new_parameter(module._parameters[key], value) for key, value in blank.items()}))
    actions: list[tuple[Action, Action]] = []
    for optimizer in optimizers:
        actions += _optimizer_actions(optimizer, [new for _, new in swaps], old, [{} for _ in swaps])
    for (module, new), before in zip(swaps, old, strict=True):
        actions += [_assign(module._parameters, key, new[key], before[key]) for key in new]
    _commit(actions, lambda: audit(model, optimizers))
    return lambda: [undo() for _, undo in reversed(actions)] and None


def check_optimizers(
    model: nn.Module, layers: Mapping[str, tuple[nn.Module, Adapter]], optimizers: Optimizers
) -> None:
    """The optimizers must hold every trainable parameter of the state-space layers, once.

    Raises:
        OptimizerError: they do not; names the parameters.
        ArgumentError: not an optimizer.
    """
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise bad_argument("optimizer", got=type(optimizer).__name__, expected="a torch.optim.Optimizer")
    counts = _held(optimizers)
    missing = [
        f"{name}.{key}" if name else key
        for name, (module, adapter) in layers.items()
        for key in adapter.parameters(module)
        if (p := module._parameters.get(key)) is not None and p.requires_grad and not counts.get(id(p))
    ]
    if missing:
        raise OptimizerError(
            f"optimizer: does not hold {len(missing)} trainable parameters of the model's state-space layers "
            f"({', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}), expected all of them. Build the optimizer from "
            "this model's parameters, after moving it to its device, or set requires_grad=False on frozen ones"
        )
    audit(model, optimizers)


def check_swappable(model: nn.Module, targets: Mapping[str, tuple[nn.Module, tuple[str, ...]]]) -> None:
    """Refuse parameters that cannot be replaced without breaking something silently.

    Raises:
        ModelError: a parameter is shared between modules, carries gradient hooks, or is not a plain Parameter.
    """
    owners: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{prefix}.{key}" if prefix else key)
    for name, (module, keys) in targets.items():
        for key in keys:
            parameter = module._parameters[key]
            full = f"{name}.{key}" if name else key
            if len(owners.get(id(parameter), ())) > 1:
                raise ModelError(
                    f"parameter {full} is shared ({', '.join(owners[id(parameter)])}), expected every state-space layer to "
                    "own its parameters. Share the whole layer module instead, or give each layer a copy"
                )
            if type(parameter) is not nn.Parameter:
                kind = type(parameter).__name__
                raise ModelError(f"parameter {full} is a {kind}, expected a plain torch.nn.Parameter. Unshard the model first")
            if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
                raise ModelError(
                    f"parameter {full} carries gradient hooks, which would be lost when it is replaced. Remove them before the "
                    "reduction and register them again on the new parameter"
                )


def audit(model: nn.Module, optimizers: Optimizers) -> None:
    """Prove that optimizers and model still belong together.

    Every parameter that an optimizer holds is held once; every trainable parameter of the model that lost its place is
    found missing by :func:`apply_edits` because the groups keep their sizes; no state belongs to a parameter outside the
    groups; element-wise state has its parameter's shape.

    Raises:
        OptimizerError: naming the first violation.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    for key, count in _held(optimizers).items():
        if count > 1:
            raise OptimizerError(
                f"optimizer: parameter {names.get(key, '(not in the model)')} is in {count} parameter groups, expected one"
            )
    for optimizer in optimizers:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for parameter, state in optimizer.state.items():
            if not isinstance(parameter, Tensor):
                continue
            if id(parameter) not in held:
                raise OptimizerError(
                    f"optimizer: holds state for a tensor of shape {tuple(parameter.shape)} that is in none of its groups, "
                    "expected none. Delete optimizer.state[that tensor]"
                )
            for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"):
                value = state.get(key)
                if isinstance(value, Tensor) and value.shape != parameter.shape:
                    raise OptimizerError(
                        f"optimizer: state {key} of {names.get(id(parameter), 'a parameter')} has shape {tuple(value.shape)}, "
                        f"expected {tuple(parameter.shape)}"
                    )


def _held(optimizers: Optimizers) -> dict[int, int]:
    counts: dict[int, int] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts
