"""What the model's outputs are, and the random probe of each: what is measured at a layer is what they feel of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressm.errors import bad_argument

# Fields in which models hand out records of their inside, as transformers' do.
RECORDS = ("hidden_states", "attentions", "router_logits", "router_probs", "past_key_values", "cache_params", "mems")


def output_tensors(output: Any) -> list[Tensor]:
    """All floating-point tensors of a model's output, at any depth of mappings, sequences and objects with fields.

    Two kinds of named fields are left out: a ``loss`` beside ``logits``, which it is computed from and would count twice, and
    records of the model's inside (:data:`RECORDS`) beside anything else.

    Raises:
        ArgumentError: there is none.
    """
    found = list(_walk(output, set()))
    if not found:
        raise bad_argument(
            "forward",
            got=f"a model output of type {type(output).__name__} without floating-point tensor",
            expected="a tensor, or a tuple, dict or dataclass of tensors",
            remedy="Pass forward=lambda model, batch: ... that returns the output tensor",
        )
    return found


def probes(outputs: list[Tensor], seed: int) -> list[Tensor]:
    """A random tensor v ~ N(0, I) for every output, scaled so that the same relative error counts the same in all of them.

    An output's own size is the median of its nonzero magnitudes times the root of their number: a norm that masked entries of
    -1e9 leave alone.  A single output is not scaled.
    """
    generators = {out.device: torch.Generator(device=out.device).manual_seed(seed) for out in outputs}
    drawn = [torch.randn(o.shape, generator=generators[o.device], device=o.device, dtype=torch.float32) for o in outputs]
    return [(probe * scale).to(out.dtype) for out, probe, scale in zip(outputs, drawn, _scales(outputs), strict=True)]


def _scales(outputs: list[Tensor]) -> list[float]:
    """The geometric mean of the outputs' sizes over each one's own; 1 for outputs that are all zero."""
    sizes = [_size(out.detach()) for out in outputs] if len(outputs) > 1 else [0.0]
    logs = [math.log(size) for size in sizes if size > 0]
    mean = math.fsum(logs) / max(1, len(logs))
    return [math.exp(mean - math.log(size)) if size > 0 else 1.0 for size in sizes]


def _size(output: Tensor) -> float:
    magnitudes = output.abs()
    magnitudes = magnitudes[(magnitudes > 0) & torch.isfinite(magnitudes)]
    return float(magnitudes.median()) * math.sqrt(magnitudes.numel()) if magnitudes.numel() else 0.0


def _walk(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen or isinstance(value, nn.Module | type):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, Mapping):
        yield from _walk_fields(value, seen)
    elif isinstance(value, tuple) and (fields := getattr(value, "_fields", None)) is not None:
        yield from _walk_fields(dict(zip(fields, value, strict=True)), seen)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _walk(item, seen)
    else:
        yield from _walk_fields(getattr(value, "__dict__", {}), seen)


def _walk_fields(fields: Mapping[Any, Any], seen: set[int]) -> Iterator[Tensor]:
    beside = {key for key in fields if str(key).endswith(RECORDS)}
    if any(str(key).endswith("logits") for key in fields.keys() - beside):
        beside.add("loss")
    found = [tensor for key, value in fields.items() if key not in beside for tensor in _walk(value, seen)]
    yield from found or [tensor for key, value in fields.items() if key in beside for tensor in _walk(value, seen)]
