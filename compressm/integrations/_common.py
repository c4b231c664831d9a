"""What the callbacks share: schedules, checks of the layers, and the configs of transformers' models inside of others."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compressm.adapters import Adapter, find_layers
from compressm.adapters.parameters import plain_parameters
from compressm.compression import Schedule
from compressm.compression.common.models import compressible_layers
from compressm.compression.surgery.audit import full_name
from compressm.errors import bad_argument

# What configs call the number of states of all layers.
SIZE_FIELDS = ("state_size", "mamba_d_state", "ssm_state_size", "linear_key_head_dim", "qk_dim_factor")

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
        plain_parameters(module, (*adapter.parameters(module), *adapter.reads(module)), name)
    return layers


@dataclass(frozen=True)
class SizedConfig:
    """A config of transformers that says how many states the layers of a model have.

    Attributes:
        config: with one field of SIZE_FIELDS.
        layers: the compressible layers with their adapters, by name within the outermost model that has the config.
    """

    config: Any
    layers: dict[str, tuple[nn.Module, Adapter]]

    @property
    def field(self) -> str:
        """What the config calls the number of states."""
        return size_field(self.config)

    @property
    def ranks(self) -> dict[str, int]:
        """The size (``Adapter.size``) of the layers by their names."""
        return {name: adapter.size(module) for name, (module, adapter) in self.layers.items()}

    def _said(self, rank: int) -> float:
        """What the field must be for layers of a size: xLSTM has its share in the channels of the model."""
        if self.field != "qk_dim_factor":
            return rank
        return rank * self.config.num_heads / self.config.hidden_size

    @property
    def _places(self) -> dict[str, Any]:
        return {name: getattr(module, "layer_idx", None) for name, (module, _) in self.layers.items()}

    @property
    def why_not_each(self) -> str | None:
        """None if the config can say another number of states for each layer, else the reason.

        It says them by ``layer_idx`` in its ``per_layer_config``.
        """
        places = list(self._places.values())
        if not hasattr(self.config, "per_layer_config"):
            return f"{type(self.config).__name__} has no per_layer_config"
        if None in places or len(set(places)) < len(places):
            return "its layers have no layer_idx of their own"
        for name, (module, adapter) in self.layers.items():
            if buffers := [key for key, value in adapter.attributes(module, 1).items() if isinstance(value, Tensor)]:
                return f"the library makes {full_name(name, buffers[0])} in one size for all layers"
        return None

    def tell(self) -> bool:
        """Write the layers' present numbers of states into the config; False, and no change, where it cannot say them."""
        ranks, field = self.ranks, self.field
        differ = len(set(ranks.values())) > 1
        if differ and self.why_not_each is not None:
            return False
        others = per_layer(self.config)
        for options in others.values():
            options.pop(field, None)
        if differ:
            for name, place in self._places.items():
                others.setdefault(place, {})[field] = self._said(ranks[name])
        if getattr(self.config, "is_heterogeneous", False):
            self.config.per_layer_config = None
        setattr(self.config, field, self._said(max(ranks.values())))
        if others := {place: options for place, options in others.items() if options}:
            self.config.per_layer_config = others
        return True


def per_layer(config: Any) -> dict[int, dict[str, Any]]:
    """What a config says of single layers, by their places; a copy."""
    if not getattr(config, "is_heterogeneous", False):
        return {}
    return {int(place): options for place, options in config.to_dict()["per_layer_config"].items()}


def sized_configs(model: nn.Module) -> list[SizedConfig]:
    """The configs with a field of SIZE_FIELDS of every transformers model in ``model``, whatever wraps it.

    Models that share a config object, such as a language model and its backbone, count once.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:  # then no such model has been built
        return []
    owners: dict[int, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, modeling.PreTrainedModel) and size_field(module.config):
            owners.setdefault(id(module.config), module)
    found = (SizedConfig(owner.config, find_layers(owner, strict=False)) for owner in owners.values())
    return [sized for sized in found if sized.layers]


def size_field(config: Any) -> str:
    """What a config calls the number of states of its layers; empty if it has none."""
    varying = getattr(config, "per_layer_attributes", None) or ()  # which raise where the config itself is asked
    return next((name for name in SIZE_FIELDS if name in varying or hasattr(config, name)), "")


def tell_configs(model: nn.Module) -> None:
    """Write the layers' numbers of states into every config that can say them."""
    for sized in sized_configs(model):
        sized.tell()
