"""Names and keys of what this package can train, read off its sources: importing them loads torch, which takes seconds.

So a wrong setting is answered at once.  Only what no task can take is refused here; the rest is for
:mod:`compressm.experiments.settings`.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from compressm.errors import ConfigError
from compressm.experiments.registry import Registry, did_you_mean
from compressm.experiments.tasks.presets import PRESETS

COMMAND_FILE, REPORT_FILE = "command.json", "report.json"
FOLDERS = {"dataset": "tasks/datasets", "model": "tasks/models", "objective": "tasks/objectives", "runs": "methods"}


def parse_assignments(texts: Iterable[str]) -> dict[str, Any]:
    """``["tau=0.1", "runs=[\\"full\\"]"]`` as a dict; values are JSON, or text where they are not.

    Raises:
        ConfigError: no equals sign.
    """
    values = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise ConfigError(f"--set: got {text!r}, expected key=value, such as tau=0.05")
        try:
            values[key.strip()] = json.loads(value)
        except ValueError:
            values[key.strip()] = value.strip()
    return values


def check(preset: str, overrides: Mapping[str, Any]) -> None:
    """Refuse what is wrong for every task, unless torch is loaded: then the parts answer as soon, those from elsewhere too.

    Args:
        preset: its name.
        overrides: keys and values that replace the preset's.

    Raises:
        ConfigError: an unknown preset, key or name, or a value that its key never takes.
    """
    if "torch" in sys.modules:
        return
    _ = PRESETS[preset]
    keys = settings()
    for key, value in overrides.items():
        if key not in keys:
            raise ConfigError(f"--set: unknown key {key!r}{did_you_mean(key, keys)}, expected one of {', '.join(sorted(keys))}")
        if key in FOLDERS:
            known = Registry[None](key)
            known |= dict.fromkeys(names(key))
            for name in (value.split(",") if isinstance(value, str) else value if isinstance(value, Sequence) else [value]):
                _ = known[str(name).strip()]
        else:
            _validate(key, value, keys[key])


def check_batch_size(preset: str, overrides: Mapping[str, Any]) -> None:
    """Refuse batches of more sequences than a dataset has, where its sources or settings say how many there are.

    Args:
        preset, overrides: as for :func:`check`, and checked; the data are those of the usual source.

    Raises:
        ConfigError: they are too large.
    """
    if "torch" in sys.modules:
        return
    values = {**PRESETS[preset], **overrides}
    dataset = next(kind for kind in _named(FOLDERS["dataset"]) if kind["name"] == values["dataset"])
    most = dataset.get("examples")
    for kind in settings()["sequences"]:
        if kind.__name__ == dataset.get("Settings"):
            most = int(values.get("sequences", kind.model_fields["sequences"].default))
    asked = int(values.get("batch_size", settings()["batch_size"][0].model_fields["batch_size"].default))
    if most is not None and asked > most:
        raise too_large(asked, most)


def too_large(batch_size: int, examples: int) -> ConfigError:
    """For a batch that takes more than there is."""
    return ConfigError(f"batch_size: got {batch_size}, expected at most {examples}, the number of training examples")


def parse_tune(text: str) -> tuple[float, ...]:
    """``lr=1,2,3`` as numbers.

    Raises:
        ConfigError: something else.
    """
    key, _, values = text.partition("=")
    try:
        numbers = tuple(float(value) for value in values.split(","))
    except ValueError:
        numbers = ()
    if key.strip() != "lr" or not numbers:
        raise ConfigError(f"--tune: got {text!r}, expected multiples of the learning rate, such as lr=1,2,3")
    return numbers


def parse_budget(text: str) -> float:
    """``90s``, ``30m``, ``2h`` or ``1h30m`` in seconds.

    Raises:
        ConfigError: something else.
    """
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip())
    seconds = sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0.0
    if not seconds:
        raise ConfigError(f"--budget: got {text!r}, expected a time such as 90s, 30m or 1h30m")
    return seconds


def check_counts(seeds: int, tuning_seeds: int, multiples: Sequence[float]) -> None:
    """How many runs a comparison has.

    Raises:
        ConfigError: none, or a single learning rate to choose from.
    """
    if seeds < 1 or tuning_seeds < 1:
        raise ConfigError(f"--seeds, --tune-seeds: got {seeds} and {tuning_seeds}, expected at least 1 each")
    if len(multiples) == 1 or any(not 0 < multiple < float("inf") for multiple in multiples):
        raise ConfigError(f"--tune lr: got {list(multiples)}, expected at least two positive multiples, such as lr=1,2,3")


def check_unfinished(out: Path) -> None:
    """Refuse to start anew where the runs of an unfinished command are.

    Raises:
        ConfigError: they are, or what tells cannot be read.
    """
    path = out / COMMAND_FILE
    if not path.exists() or (out / REPORT_FILE).exists() or not any(out.glob("*.safetensors")):
        return
    try:
        preset = json.loads(path.read_text(encoding="utf-8"))["preset"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}), expected what compressm train wrote. Use --overwrite") from error
    raise ConfigError(
        f"--out {out}: holds an unfinished {preset} command. Continue it with --resume, start anew with --overwrite, or choose "
        "another folder"
    )


def names(what: str) -> list[str]:
    """Of all datasets, models, objectives or methods (``what`` as a setting is called)."""
    return [str(kind["name"]) for kind in _named(FOLDERS[what])]


@functools.cache
def settings() -> dict[str, list[type[BaseModel]]]:
    """Every key, with the classes of settings that declare it, each a model of its own lines alone."""
    found: dict[str, list[type[BaseModel]]] = {}
    for kind in (*_classes("tasks"), *_classes("methods")):
        if kind.name.endswith("Settings"):
            kind.bases, kind.body = [ast.Name("BaseModel", ast.Load())], [n for n in kind.body if isinstance(n, ast.AnnAssign)]
            kind.body = kind.body or [ast.Pass()]
            space: dict[str, Any] = {"BaseModel": BaseModel, "Field": Field, "Literal": Literal}
            module = ast.fix_missing_locations(ast.Module([kind], []))
            exec(compile(module, kind.name, "exec", dont_inherit=True), space)
            for key in space[kind.name].model_fields:
                found.setdefault(key, []).append(space[kind.name])
    return found


def _validate(key: str, value: Any, kinds: Sequence[type[BaseModel]]) -> None:
    """Raise ConfigError where none of the classes that declare a key takes the value."""
    errors = []
    for kind in kinds:
        try:
            kind.__pydantic_validator__.validate_assignment(kind.model_construct(), key, value)
        except ValidationError as error:
            errors.append(error)
    if len(errors) == len(kinds):
        raise refused(errors[0]) from errors[0]


def refused(error: ValidationError) -> ConfigError:
    """The first thing that is wrong, in a sentence."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    place = f"{key}: got {first['input']!r}: " if key else ""
    return ConfigError(f"{place}{first['msg'].removeprefix('Value error, ')}")


def _named(folder: str) -> Iterator[dict[str, Any]]:
    """What the classes that have a name set to a constant, or to another name, which stands for itself."""
    for kind in _classes(folder):
        found: dict[str, Any] = {}
        for node in kind.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant | ast.Name):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                value = node.value.value if isinstance(node.value, ast.Constant) else node.value.id
                found |= {target.id: value for target in targets if isinstance(target, ast.Name)}
        if "name" in found:
            yield found


def _classes(folder: str) -> Iterator[ast.ClassDef]:
    for path in sorted((Path(__file__).parent / folder).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        yield from (node for node in tree.body if isinstance(node, ast.ClassDef))
