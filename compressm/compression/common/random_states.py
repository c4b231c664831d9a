"""The states of the random generators that training draws from: torch (CPU and the model's GPUs), numpy, Python."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressm.errors import CheckpointError

WORDS = 624  # of the Mersenne twister


def capture(model: nn.Module) -> dict[str, Any]:
    """States of the global generators, as a tree of JSON values and tensors."""
    _, words, gauss = random.getstate()
    legacy: Any = np.random.get_state()  # noqa: NPY002
    _, key, position, has_gauss, cached = legacy
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device) for device in _devices(model)],
        "numpy": {
            "words": torch.from_numpy(key.astype(np.int64)), "position": int(position), "gauss": [int(has_gauss), float(cached)]
        },
        "python": {"words": torch.tensor(words[:-1], device="cpu"), "position": words[-1], "gauss": gauss},
    }  # fmt: skip


def check(state: Any, model: nn.Module) -> None:
    """Raise CheckpointError unless :func:`restore` can take the state."""
    if not isinstance(state, Mapping) or state.keys() != {"torch", "cuda", "numpy", "python"}:
        raise CheckpointError("random states: malformed")
    devices = _devices(model)
    if not isinstance(state["cuda"], list) or len(state["cuda"]) != len(devices):
        got = len(state["cuda"]) if isinstance(state["cuda"], list) else "malformed"
        raise CheckpointError(
            f"random states: of {got} GPUs, the model is on {len(devices)}. Load with rng=False; draws will differ then"
        )
    for device, value in zip([torch.device("cpu"), *devices], [state["torch"], *state["cuda"]], strict=True):
        try:
            torch.Generator(device).set_state(value)
        except (RuntimeError, TypeError) as error:
            raise CheckpointError(f"random states: torch does not take that of {device} ({error})") from error
    for name in ("numpy", "python"):
        part = state[name]
        if not isinstance(part, Mapping) or part.keys() != {"words", "position", "gauss"} or not _is_twister(part):
            raise CheckpointError(f"random states: that of {name} is malformed")
    gauss = state["numpy"]["gauss"]
    if not isinstance(gauss, list) or [type(value) for value in gauss] != [int, float] or gauss[0] not in (0, 1):
        raise CheckpointError("random states: that of numpy is malformed")
    if state["python"]["gauss"] is not None and type(state["python"]["gauss"]) is not float:
        raise CheckpointError("random states: that of python is malformed")


def adopted(state: Any, model: nn.Module) -> Any:
    """A state from another machine, or with tuples as Python and numpy give them, in the form that :func:`check` judges.

    Where the model is on another number of GPUs now, their generators stay as they are.
    """
    if not isinstance(state, Mapping):
        return state
    state, devices = dict(state), _devices(model)
    if isinstance(state.get("cuda"), list) and len(state["cuda"]) != len(devices):
        state["cuda"] = [torch.cuda.get_rng_state(device) for device in devices]
    if isinstance(part := state.get("python"), tuple) and len(part) == 3:
        *words, position = part[1]
        state["python"] = {"words": torch.tensor(words, device="cpu"), "position": position, "gauss": part[2]}
    if isinstance(part := state.get("numpy"), tuple) and len(part) == 5:
        state["numpy"] = {"words": part[1], "position": part[2], "gauss": list(part[3:])}
    return state


def restore(state: Mapping[str, Any], model: nn.Module) -> None:
    """Put the generators into states that :func:`check` has accepted."""
    torch.set_rng_state(state["torch"])
    for device, value in zip(_devices(model), state["cuda"], strict=True):
        torch.cuda.set_rng_state(value, device)
    part, (has_gauss, cached) = state["numpy"], state["numpy"]["gauss"]
    words = part["words"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, part["position"], has_gauss, cached))  # noqa: NPY002
    part = state["python"]
    random.setstate((3, (*part["words"].tolist(), part["position"]), part["gauss"]))


def _is_twister(part: Mapping[str, Any]) -> bool:
    """numpy does not check the position: one that is too large would read beyond the words."""
    words, position = part["words"], part["position"]
    if not isinstance(words, Tensor) or words.dtype != torch.int64 or words.shape != (WORDS,):
        return False
    inside = bool((words >= 0).all()) and bool((words < 1 << 32).all())
    return inside and type(position) is int and 0 <= position <= WORDS


def _devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
