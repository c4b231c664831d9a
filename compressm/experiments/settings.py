"""The settings of a command, put together from those of its task's parts and of the methods."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError, create_model, model_validator

from compressm.errors import ConfigError
from compressm.experiments.declared import refused
from compressm.experiments.methods import METHODS, Method
from compressm.experiments.registry import did_you_mean
from compressm.experiments.tasks.datasets import DATASETS
from compressm.experiments.tasks.models import MODELS
from compressm.experiments.tasks.objectives import OBJECTIVES
from compressm.experiments.tasks.parts import Dataset, Model, Objective, Part
from compressm.experiments.tasks.presets import PRESETS
from compressm.experiments.tasks.settings import Settings, own_keys

Parts = tuple[type[Dataset], type[Model], type[Objective]]
Owner = Method | type[Part]  # of keys


class _Whole(Settings):
    """The settings of a command with the keys of all its parts, which must agree with each other."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the keys of methods that are not among the runs."""
        parts = DATASETS[self.dataset], MODELS[self.model], OBJECTIVES[self.objective]
        owners: list[Owner] = [*parts, *(METHODS[name] for name in self.runs)]
        meant = {*Settings.model_fields, *(key for owner in owners for key in owner.Settings.model_fields)}
        return self.model_dump(mode="json", include=meant)

    @model_validator(mode="after")
    def _consistent(self) -> _Whole:
        kind = MODELS[self.model]
        fitting = ", ".join(method.name for method in _fitting(kind))
        for name in self.runs:
            if name not in METHODS:
                raise ValueError(f"runs: got {name!r}{did_you_mean(name, METHODS)}, expected one of {fitting}")
            if reason := METHODS[name].unfit(kind):
                raise ValueError(f"runs: {name!r} {reason}; expected one of {fitting}")
        if len(set(self.runs)) != len(self.runs):
            raise ValueError("runs must differ")
        model, methods = kind(self), [METHODS[name] for name in self.runs]
        model.check(reduced=any(method.reduced for method in methods))
        for place, method in enumerate(methods):
            method.check(self, model)
            for other in method.needs(self, model):
                if other not in self.runs[:place]:
                    raise ValueError(f"runs: {method.name!r} takes over from {other!r}, which must come before it")
        return self


def resolve(preset: str, overrides: Mapping[str, Any]) -> Settings:
    """The settings of a preset with some replaced.

    Raises:
        ConfigError: unknown preset or key (names the allowed ones), or a value out of range.
    """
    return read_settings({**PRESETS[preset], **overrides})


def read_settings(values: Mapping[str, Any]) -> Settings:
    """Settings from their keys and values, such as :meth:`Settings.to_dict` gives.

    A dataset says which model and which objective go with it where the values name none.

    Raises:
        ConfigError: an unknown key, or one without meaning for this task (names the allowed ones), or a value out of range.
    """
    parts = _chosen(values)
    whole = settings_class(parts, _fitting(parts[1]))
    names = [key for key in whole.model_fields if key != "title"]
    for key in values:
        if key not in whole.model_fields and key in _known_keys():
            raise ConfigError(f"{key} has no meaning for the dataset {parts[0].name!r}, expected one of {', '.join(names)}")
        if key not in whole.model_fields:
            raise ConfigError(f"--set: unknown key {key!r}{did_you_mean(key, names)}, expected one of {', '.join(names)}")
    try:
        return whole.model_validate({**values, "model": parts[1].name, "objective": parts[2].name})
    except ValidationError as error:
        raise refused(error) from error


def settings_class(parts: Parts, methods: Iterable[Method]) -> type[Settings]:
    """The class of a task's settings: those of its parts and of the methods that can be used with it.

    Raises:
        ConfigError: two of them declare the same key.
    """
    owners: list[Owner] = [*parts, *methods]
    keys = [(owner, own_keys(owner.Settings)) for owner in owners]
    for (one, mine), (other, theirs) in itertools.combinations(keys, 2):
        if twice := [key for key in mine if key in theirs and mine[key] is not theirs[key]]:
            raise ConfigError(
                f"the key {twice[0]!r} is declared by {one.name!r} and by {other.name!r}. Rename one, or let both inherit it"
            )
    return _combined(tuple(dict.fromkeys(owner.Settings for owner in owners)))


@functools.cache
def _combined(kinds: tuple[type[Settings], ...]) -> type[Settings]:
    bases = [kind for kind in kinds if not any(kind is not other and issubclass(other, kind) for other in kinds)]
    return create_model("Settings", __base__=(_Whole, *reversed([base for base in bases if base is not Settings])))


def _chosen(values: Mapping[str, Any]) -> Parts:
    """The parts of a task.

    Raises:
        ConfigError: an unknown name, or parts that do not go together.
    """
    dataset = DATASETS[str(values["dataset"])]
    model = MODELS[str(values.get("model", dataset.model))]
    objective = OBJECTIVES[str(values.get("objective", dataset.objective))]
    for part, registry in ((model, MODELS), (objective, OBJECTIVES)):
        if not issubclass(dataset.gives, part.reads):
            fitting = ", ".join(name for name, other in registry.items() if issubclass(dataset.gives, other.reads))
            raise ConfigError(
                f"{registry.what}: {part.name!r} reads {part.reads.kind}, the dataset {dataset.name!r} gives "
                f"{dataset.gives.kind}; expected one of {fitting}"
            )
    return dataset, model, objective


def _fitting(model: type[Model]) -> list[Method]:
    """The methods that can be used with a family of models."""
    return [method for method in METHODS.values() if not method.unfit(model)]


def _known_keys() -> set[str]:
    """The keys that the settings of any part or method have."""
    owners: list[type[Part] | Method] = [*DATASETS.values(), *MODELS.values(), *OBJECTIVES.values(), *METHODS.values()]
    return {key for owner in owners for key in owner.Settings.model_fields}
