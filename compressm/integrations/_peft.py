"""Models whose ``save_pretrained`` writes adapters alone, and the base that these belong to."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from compressm.errors import ModelError

INNER = ("base_layer", "original_module")  # where peft's wrappers keep the module that they stand for


def saves_adapters_alone(model: nn.Module) -> bool:
    """Whether a checkpoint of the model has no base: a PEFT model, or one after transformers' ``add_adapter``."""
    peft = sys.modules.get("peft")  # not loaded: the model cannot be of it
    kinds = () if peft is None else (peft.PeftModel, peft.PeftMixedModel)
    return any(isinstance(module, kinds) or getattr(module, "_hf_peft_config_loaded", False) for module in model.modules())


def save_base(model: nn.Module, folder: str | Path) -> None:
    """Store the base of a model with adapters, without these, so that ``from_pretrained(folder)`` loads it.

    After a reduction the adapters belong to this base and no longer to the one that they were put on.  The callback does this
    for the Trainer's checkpoints, in their folder ``base``.

    Args:
        model: a PEFT model, or a transformers model after ``add_adapter``.
        folder: where.

    Raises:
        ModelError: there is no transformers model inside.
    """
    base = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if base is None:
        raise ModelError(f"model: {type(model).__name__} has no transformers model inside, expected one that has adapters")
    flagged = getattr(base, "_hf_peft_config_loaded", False)
    base._hf_peft_config_loaded = False  # or it would write the adapters alone
    try:
        base.save_pretrained(folder, state_dict=_without_adapters(base))
    finally:
        base._hf_peft_config_loaded = flagged


def _without_adapters(base: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` that the model had before wrappers were put around some of its modules."""
    state: dict[str, Any] = base.state_dict()
    wrappers = [(name, inner) for name, module in base.named_modules() for inner in INNER if inner in module._modules]
    for name, inner in reversed(wrappers):  # the innermost first
        own, kept = f"{name}.", f"{name}.{inner}."
        state = {
            own + key.removeprefix(kept) if key.startswith(kept) else key: value
            for key, value in state.items()
            if key.startswith(kept) or not key.startswith(own)
        }
    return state
