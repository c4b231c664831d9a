"""What adapters ask of a layer's parameters and of what its mixer is called with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressm.errors import DataError, ModelError, NumericalError


def holder(module: nn.Module, key: str) -> tuple[nn.Module, str]:
    """The submodule that owns ``key`` (such as ``"x_proj.weight"``), and the last part of the name.

    Raises:
        AttributeError: no such submodule.
    """
    owner, _, leaf = key.rpartition(".")
    return module.get_submodule(owner), leaf


def parameter_at(module: nn.Module, key: str) -> nn.Parameter | None:
    """The parameter under a name relative to the layer; None if there is none."""
    try:
        owner, leaf = holder(module, key)
    except AttributeError:
        return None
    return owner._parameters.get(leaf)


def own_parameter(module: nn.Module, key: str) -> nn.Parameter:
    """The parameter under a name that the layer is known to have.

    Raises:
        ModelError: it is missing or computed.
    """
    return plain_parameters(module, (key,))[key]


def plain_parameters(module: nn.Module, names: tuple[str, ...], name: str = "") -> dict[str, nn.Parameter]:
    """The named parameters of a module.

    Raises:
        ModelError: one is missing or computed (``torch.nn.utils.parametrize``, pruning).
    """
    found: dict[str, nn.Parameter] = {}
    for key in names:
        parameter = parameter_at(module, key)
        if parameter is None:
            raise ModelError(
                f"{label(module, name)}: {key} is not a plain parameter. Remove parametrizations and pruning masks "
                "(torch.nn.utils.parametrize.remove_parametrizations) before compressing; merge adapters such as LoRA, or "
                "leave this projection out of their target_modules"
            )
        found[key] = parameter
    return found


def check_finite(module: nn.Module, parameters: Mapping[str, Tensor], name: str = "") -> None:
    """Raise NumericalError naming the first parameter that holds a NaN or an infinity."""
    for key, parameter in parameters.items():
        bad = int((~torch.isfinite(parameter.detach())).sum())
        if bad:
            raise NumericalError(
                f"{label(module, name)}: parameter {key} holds {bad} NaN or infinite of {parameter.numel()} values, "
                "expected finite ones. Training has diverged: go back to an earlier checkpoint or lower the learning rate"
            )


def label(module: nn.Module, name: str = "") -> str:
    """How messages call a layer."""
    kind = type(module).__name__
    return f"layer {name!r} ({kind})" if name else f"layer of type {kind}"


def expansion(channels: int, of: int) -> float:
    """The factor that gives ``channels`` where a constructor rounds its product with ``of`` down."""
    factor = channels / of
    return factor if int(of * factor) == channels else math.nextafter(factor, math.inf)


def wide(tensor: Tensor) -> Tensor:
    """A tensor in float64, or complex128 where it is complex."""
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)


def precision(projection: nn.Module, default: torch.dtype) -> torch.dtype:
    """Of a projection's weights, to which the caller's autocast would convert an input."""
    computed = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return next((p.dtype for p in projection.parameters() if p.dtype in computed), default)


def layer_input(module: nn.Module, args: tuple, kwargs: Mapping[str, Any], projection: str = "in_proj") -> Tensor:
    """The first argument of a mixer's call, (batch, length, d_model), in the precision of its projection.

    Raises:
        DataError: it is something else.
    """
    hidden = args[0] if args else next((v for k, v in kwargs.items() if k == "u" or k.startswith("hidden_states")), None)
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        got = type(hidden).__name__ if not isinstance(hidden, Tensor) else f"a tensor of shape {tuple(hidden.shape)}"
        raise DataError(f"calibration: a {type(module).__name__} layer got {got}, expected (batch, length, d_model)")
    return hidden.to(precision(module.get_submodule(projection), hidden.dtype))
