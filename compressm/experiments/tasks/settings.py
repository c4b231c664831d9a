"""The settings that every training command has; datasets, models, objectives and methods add theirs."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Settings(BaseModel):
    """One training command.  Frozen; unknown keys are refused.

    ``dataset``, ``model`` and ``objective`` choose the task, ``runs`` the methods.  ``steps`` are optimizer steps, ``lr`` the
    peak learning rate; ``warmup`` is the fraction of steps with linearly rising learning rate, ``cosine`` lets it fall
    afterwards, to ``min_lr_ratio`` of the peak; ``max_grad_norm`` clips gradients, None does not; ``autocast`` runs the forward
    of training steps under ``torch.autocast`` with this dtype, while parameters and evaluations stay float32.

    A part of the task, or a method, that has keys of its own declares them in a subclass, its ``Settings``; the settings of a
    command are an instance of all of these (:func:`compressm.experiments.settings.settings_class`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    dataset: str
    model: str
    objective: str
    runs: tuple[str, ...] = Field(min_length=1)
    seed: int = Field(0, ge=0, lt=2**31)
    device: str = "cpu"
    steps: int = Field(20000, ge=1)
    batch_size: int = Field(50, ge=1)
    lr: float = Field(4e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float | None = Field(None, gt=0)
    autocast: Literal["bfloat16"] | None = None
    warmup: float = Field(0.0, ge=0, lt=1)
    cosine: bool = False
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    calibration_sequences: int = Field(64, ge=1)
    log_every: int = Field(100, ge=1)
    eval_every: int = Field(1000, ge=1)
    timing_rounds: int = Field(20, ge=0)

    @field_validator("runs", mode="before")
    @classmethod
    def _separated(cls, value: Any) -> Any:
        """Names between commas, as a command line gives them."""
        return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return self.model_dump(mode="json")


class BlockSettings(Settings):
    """Of models that are blocks one after the other: how many, their channels, and the states of each at full size."""

    blocks: int = Field(1, ge=1)
    d_model: int = Field(8, ge=1)
    d_state: int = Field(256, ge=1)


SettingsClass = type[Settings]  # of the attribute ``Settings``, in the bodies of classes that have it


def own_keys(kind: type[Settings]) -> dict[str, type[Settings]]:
    """The keys that a class of settings adds to the common ones, and which class in its line declares each."""
    return {
        key: next(cls for cls in kind.__mro__ if key in inspect.get_annotations(cls))
        for key in kind.model_fields
        if key not in Settings.model_fields
    }
