"""Every setting of a training command, and the presets."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compressm.errors import ConfigError

TASKS = {"digits": "images", "smnist": "images", "scifar": "images", "stdlib": "text"}  # by dataset
KEYS_OF_ONE_TASK = {
    "images": {
        "dropout", "r_min", "r_max", "max_phase", "narrow_max_phase", "ssm_lr_factor",
        "tau", "attempts", "recipe", "multiple_of",
    },
    "text": {"length", "rank", "eval_bytes"},
}  # fmt: skip
RunName = Literal["compressed", "full", "small", "small_narrow"]


class Settings(BaseModel):
    """One training command.  Frozen; unknown keys, and keys that mean nothing for the dataset's task, are refused.

    ``steps`` are optimizer steps, ``lr`` the peak learning rate; ``warmup`` is the fraction of steps with linearly rising
    learning rate, ``cosine`` lets it fall to zero afterwards; ``max_grad_norm`` clips gradients, None does not; ``autocast``
    runs the forward of training steps under ``torch.autocast`` with this dtype, while parameters and evaluations stay float32.
    A reduction is made at the fraction ``reduce_until`` of the steps.

    Images only: ``ssm_lr_factor`` scales the learning rate of nu_log, theta_log, gamma_log and B, which get no weight decay;
    ``tau`` is the fraction of the sum of Hankel singular values that is discarded; ``attempts`` reductions are spread evenly
    up to ``reduce_until``.  Text only: ``length`` is the number of bytes that an example predicts, ``rank`` the states that a
    reduction leaves in every layer, ``eval_bytes`` the number of bytes of an evaluation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    dataset: Literal["digits", "smnist", "scifar", "stdlib"]
    runs: tuple[RunName, ...] = Field(("compressed", "full", "small", "small_narrow"), min_length=1)
    seed: int = Field(0, ge=0, lt=2**31)
    device: str = "cpu"
    blocks: int = Field(1, ge=1)
    d_model: int = Field(8, ge=1)
    d_state: int = Field(256, ge=1)
    length: int = Field(256, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    r_min: float = Field(0.9, ge=0, lt=1)
    r_max: float = Field(0.999, gt=0, lt=1)
    max_phase: float = Field(6.28, gt=0, le=6.2831853)
    narrow_max_phase: float = Field(0.314, gt=0, le=6.2831853)
    steps: int = Field(20000, ge=1)
    batch_size: int = Field(50, ge=1)
    lr: float = Field(4e-3, gt=0)
    ssm_lr_factor: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float | None = Field(None, gt=0)
    autocast: Literal["bfloat16"] | None = None
    warmup: float = Field(0.0, ge=0, lt=1)
    cosine: bool = False
    tau: float = Field(0.02, ge=0, lt=1)
    rank: int = Field(12, ge=1)
    attempts: int = Field(1, ge=1)
    reduce_until: float = Field(0.2, gt=0, le=1)
    recipe: Literal["default", "paper"] = "default"
    multiple_of: int = Field(1, ge=1)
    calibration_sequences: int = Field(64, ge=1)
    log_every: int = Field(100, ge=1)
    eval_every: int = Field(1000, ge=1)
    eval_bytes: int = Field(2**17, ge=1)
    timing_rounds: int = Field(20, ge=0)

    @property
    def task(self) -> str:
        """``"images"`` or ``"text"``."""
        return TASKS[self.dataset]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the keys of other tasks."""
        return self.model_dump(mode="json", exclude=foreign_keys(self.task))

    @model_validator(mode="after")
    def _of_one_task(self) -> Settings:
        foreign = foreign_keys(self.task)
        for key in sorted(self.model_fields_set & foreign):
            names = ", ".join(_allowed(self.task))
            raise ValueError(f"{key} has no meaning for the dataset {self.dataset!r}, expected one of {names}")
        if self.task == "text" and "small_narrow" in self.runs:
            raise ValueError("runs: 'small_narrow' changes initial phases, Mamba has none; expected compressed, full or small")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.r_min >= self.r_max:
            raise ValueError("r_min must be below r_max")
        if len(set(self.runs)) != len(self.runs):
            raise ValueError("runs must differ")
        if self.task == "text" and self.rank >= self.d_state and set(self.runs) != {"full"}:
            raise ValueError(f"rank = {self.rank} must be below d_state = {self.d_state}")
        if self.task == "images" and {"small", "small_narrow"} & set(self.runs) and self.runs[0] != "compressed":
            raise ValueError("small runs take their states from 'compressed', which must be the first run")
        if "compressed" in self.runs and self.steps * self.reduce_until < self.attempts:
            raise ValueError("steps * reduce_until must be at least attempts: train longer or reduce later")
        return self


_PAPER = {"recipe": "paper", "attempts": 4, "reduce_until": 0.1, "runs": ("compressed",)}
_SMNIST = {"dataset": "smnist", "steps": 200_000, "lr": 4e-4, "eval_every": 5000, "log_every": 500}
_SCIFAR = {
    "dataset": "scifar", "blocks": 6, "d_model": 512, "d_state": 384, "steps": 180_000, "lr": 1e-3, "ssm_lr_factor": 0.25,
    "weight_decay": 0.05, "warmup": 0.1, "cosine": True, "eval_every": 4500, "log_every": 100,
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "title": "Handwritten digits, 64 pixels in a row", "dataset": "digits", "blocks": 2, "d_model": 16, "d_state": 64,
        "steps": 2400, "lr": 4e-3, "warmup": 0.05, "cosine": True, "tau": 0.2, "log_every": 20, "eval_every": 200,
    },
    "smnist": {
        "title": "Sequential MNIST, 784 pixels in a row", "dataset": "smnist", "steps": 20_000, "lr": 4e-3,
        "warmup": 0.05, "cosine": True, "tau": 0.04, "log_every": 100, "eval_every": 2000,
    },
    "smnist-baseline": {"title": "Sequential MNIST, the paper's full-size run", **_SMNIST, "runs": ("full",)},
    **{
        f"smnist-tau{tau}": {"title": f"Sequential MNIST, the paper's tau {tau}", **_SMNIST, **_PAPER, "tau": float(tau)}
        for tau in ("0.01", "0.02", "0.04")
    },
    "scifar": {"title": "Sequential CIFAR-10, 1024 pixels in a row", **_SCIFAR, "tau": 0.05},
    "scifar-baseline": {"title": "Sequential CIFAR-10, the paper's full-size run", **_SCIFAR, "runs": ("full",)},
    **{
        f"scifar-tau{tau}": {"title": f"Sequential CIFAR-10, the paper's tau {tau}", **_SCIFAR, **_PAPER, "tau": float(tau)}
        for tau in ("0.05", "0.10", "0.15")
    },
    "stdlib-lm": {
        "title": "Next byte of Python's standard library, Mamba", "dataset": "stdlib", "runs": ("compressed", "full", "small"),
        "blocks": 2, "d_model": 128, "d_state": 128, "rank": 12, "length": 256, "steps": 3000, "batch_size": 8, "lr": 6e-3,
        "weight_decay": 0.1, "max_grad_norm": 1.0, "warmup": 0.05, "cosine": True, "reduce_until": 0.1, "log_every": 20,
        "eval_every": 300,
    },
}  # fmt: skip


def resolve(preset: str, overrides: Mapping[str, Any]) -> Settings:
    """The settings of a preset with some replaced.

    Raises:
        ConfigError: unknown preset or key (names the allowed ones), or a value out of range.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset: got {preset!r}{_close(preset, PRESETS)}, expected one of {', '.join(PRESETS)}")
    for key in overrides:
        if key not in Settings.model_fields:
            names = _allowed(TASKS[PRESETS[preset]["dataset"]])
            raise ConfigError(f"--set: unknown key {key!r}{_close(key, names)}, expected one of {', '.join(names)}")
    try:
        return Settings.model_validate({**PRESETS[preset], **overrides})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        place = f"{key}: got {first['input']!r}: " if key else ""
        raise ConfigError(f"{place}{first['msg'].removeprefix('Value error, ')}") from error


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


def foreign_keys(task: str) -> set[str]:
    """The settings that belong to other tasks."""
    return {key for other, keys in KEYS_OF_ONE_TASK.items() if other != task for key in keys}


def _allowed(task: str) -> list[str]:
    return [name for name in Settings.model_fields if name not in {"title", *foreign_keys(task)}]


def _close(word: str, words: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
