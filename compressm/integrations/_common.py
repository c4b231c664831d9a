"""What the callbacks share: schedules, checks of the layers, and the configs of transformers' models inside of others."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from compressm.adapters import Adapter, find_layers
from compressm.adapters.base import plain_parameters
from compressm.compression import Schedule
from compressm.compression.common.models import compressible_layers
from compressm.errors import bad_argument

SIZE_FIELDS = ("state_size", "mamba_d_state", "ssm_state_size")  # what configs call the number of states of all layers

ScheduleArgument = Schedule | Callable[[int], Schedule]


def as_schedule(schedule: ScheduleArgument, total_steps: float) -> Schedule:
    """The schedule, or what the function makes of the number of optimizer steps of the whole training.

    Raises:
        ArgumentError: a function, and the number of steps is not known.
    """
    if isinstance(schedule, Schedule):
        return schedule
    if not 0 < total_steps < float("inf"):
        remedy = "Limit the training, or pass a schedule with steps of its own, such as compressm.At([1000])"
        raise bad_argument("schedule", got="a training without end", expected="a number of optimizer steps", remedy=remedy)
    return schedule(int(total_steps))


def checked_layers(model: nn.Module) -> dict[str, tuple[nn.Module, Adapter]]:
    """The layers that can be compressed, all that a reduction reads in its place.

    Raises:
        ModelError: there are none, or something stands in the place of a parameter, such as LoRA on ``x_proj``.
    """
    layers = compressible_layers(model)
    for name, (module, adapter) in layers.items():
        plain_parameters(module, adapter.reads(module), name)
    return layers


def sized_configs(model: nn.Module) -> list[tuple[Any, dict[str, int]]]:
    """The configs with one field of SIZE_FIELDS for all layers of every transformers model in ``model``, whatever wraps it.

    Models that share a config object, such as a language model and its backbone, count once.

    Returns:
        each config with the ``Adapter.size`` of its compressible layers, by name within the outermost model that has it.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:  # then no such model has been built
        return []
    owners: dict[int, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, modeling.PreTrainedModel) and size_field(module.config):
            owners.setdefault(id(module.config), module)
    layers = {key: find_layers(owner, strict=False) for key, owner in owners.items()}
    return [
        (owners[key].config, {name: adapter.size(module) for name, (module, adapter) in found.items()})
        for key, found in layers.items()
        if found
    ]


def size_field(config: Any) -> str:
    """What a config calls the number of states of its layers; empty if it has none."""
    return next((name for name in SIZE_FIELDS if hasattr(config, name)), "")


def tell_configs(model: nn.Module) -> None:
    """Set the size of every config whose layers agree to their number of states."""
    for config, ranks in sized_configs(model):
        if len(set(ranks.values())) == 1:
            setattr(config, size_field(config), next(iter(ranks.values())))
