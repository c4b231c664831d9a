"""Checkpoints of transformers whose layers differ in their number of states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from compressm.adapters import find_layers
from compressm.compression.surgery.edits import reshape
from compressm.errors import CheckpointError, ModelError, bad_argument
from compressm.integrations._common import per_layer, size_field, tell_configs

Model = type[PreTrainedModel]


def from_pretrained(folder: str | Path, model_class: Model | None = None, **options: Any) -> PreTrainedModel:
    """Load a transformers checkpoint whose layers differ in their number of states, or any other.

    transformers' own ``from_pretrained`` builds all layers of one size and raises where ``config.per_layer_config`` says
    several.  The result is a model like every other: it trains, generates with a cache, shrinks further and is saved.

    Args:
        folder: where ``save_pretrained`` wrote it, or its name on the hub.
        model_class: such as ``transformers.GraniteMoeHybridForCausalLM``; None: the class that was saved.
        options: of the class's ``from_pretrained``, such as ``dtype``.

    Returns:
        the model, in evaluation mode as transformers leaves it.

    Raises:
        ArgumentError: ``model_class`` is none of transformers' models.
        CheckpointError: the checkpoint is not whole: its config, a file or weights are missing, damaged or do not fit.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: has no config of transformers that can be read ({_briefly(error)})") from error
    kind, ranks = _class_of(config, model_class), _take_ranks(config)
    built: Any = _of_ranks(kind, ranks) if ranks else kind
    model: Any
    told: Any
    try:
        model, told = built.from_pretrained(folder, config=config, output_loading_info=True, **options)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: its weights are not whole or do not fit its config ({_briefly(error)})") from error
    if missing := sorted(told["missing_keys"]):
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CheckpointError(f"{folder}: has no weights for {names}, expected those of a whole {kind.__name__}")
    model.__class__ = kind
    tell_configs(model)
    return model


def _class_of(config: PreTrainedConfig, model_class: Any) -> Model:
    if model_class is None:
        saved: Any = next(iter(config.architectures or ()), None)
        model_class = getattr(transformers, str(saved), saved)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        remedy = "Of an Auto class pass the one that it would choose"
        raise bad_argument("model_class", got=repr(model_class), expected="a class of transformers' models", remedy=remedy)
    return model_class


def _take_ranks(config: PreTrainedConfig) -> dict[int, int]:
    """The numbers of states that a config says of single layers, by their places; afterwards it says one for all.

    With several the library's layers refuse to read theirs.
    """
    others, field = per_layer(config), size_field(config)
    ranks = {place: options.pop(field) for place, options in others.items() if field in options}
    if ranks:
        config.per_layer_config = None
        config.per_layer_config = {place: options for place, options in others.items() if options} or None
    return ranks


def _of_ranks(kind: Model, ranks: dict[int, int]) -> Model:
    """A class whose models are built with layers of these numbers of states."""

    def build(self: Any, config: PreTrainedConfig, *args: Any, **options: Any) -> None:
        kind.__init__(self, config, *args, **options)
        layers = find_layers(self)
        places: dict[Any, str] = {module.layer_idx: name for name, (module, _) in layers.items()}
        if unknown := sorted(ranks.keys() - places.keys()):
            raise ModelError(f"per_layer_config says numbers of states of layers {unknown}, which have none")
        reshape(self, layers, {places[place]: rank for place, rank in ranks.items()})

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})


def _briefly(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
