"""What a calibration batch may look like, and how a model is called with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressm.errors import DataError, bad_argument


def take(batches: Iterable[Any], sequences: int, *, optional: bool = False) -> list[tuple[Any, int]]:
    """The first batches holding ``sequences`` sequences in all, the last one cut, each with its number of sequences.

    Args:
        optional: no sequence at all is fine, as where other processes have some; nor need ``sequences`` be positive.

    Raises:
        DataError: no sequence at all.
        ArgumentError: not an iterable of batches, or a batch without tensors.
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        kind = type(batches).__name__
        remedy = "Put a single batch into a list"
        raise bad_argument("calibration", got=kind, expected="an iterable of batches, such as a DataLoader", remedy=remedy)
    taken: list[tuple[Any, int]] = []
    left = sequences
    for batch in batches if left > 0 else ():
        count = _sequences(batch)
        if count == 0:
            continue
        taken.append((batch, count) if count <= left else (_cut(batch, count, left), left))
        left -= min(count, left)
        if left == 0:
            break
    if not taken and not optional:
        raise DataError("calibration: got no sequences, expected at least one batch. Is the iterator already exhausted?")
    return taken


def replayable(batches: Iterable[Any] | None) -> Iterable[Any] | None:
    """The batches, such that an iterator gives them again to later reductions."""
    return Replay(batches) if isinstance(batches, Iterator) else batches


class Replay:
    """Remembers what an iterator gave."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self.iterator = iterator
        self.seen: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        yield from self.seen
        for batch in self.iterator:
            self.seen.append(batch)
            yield batch


def trainable(batch: Any) -> Any:
    """The batch, with ordinary copies of tensors that were made in inference mode: autograd refuses those."""
    if any(tensor.is_inference() for tensor in _tensors(batch)):
        return _mapped(lambda tensor: tensor.clone() if tensor.is_inference() else tensor, batch)
    return batch


def default_forward(model: nn.Module, batch: Any) -> Any:
    """model(batch) for a tensor, model(first entry) for a tuple or list, model(**batch) for a dict; moved to its device."""
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    if isinstance(batch, Mapping):
        return model(**{key: _to(value, device) for key, value in batch.items()})
    return model(_to(batch[0] if isinstance(batch, tuple | list) else batch, device))


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def _sequences(batch: Any) -> int:
    tensors = [tensor for tensor in _tensors(batch) if tensor.dim() > 0]
    if not tensors:
        expected = "a tensor, a tuple (inputs, ...) or a dict of keyword arguments"
        raise bad_argument("calibration batch", got=type(batch).__name__, expected=expected)
    return tensors[0].shape[0]


def _cut(batch: Any, count: int, left: int) -> Any:
    """The first ``left`` of ``count`` sequences: every tensor whose first dimension is ``count``, at any depth."""
    return _mapped(lambda tensor: tensor[:left] if tensor.dim() > 0 and tensor.shape[0] == count else tensor, batch)


def _mapped(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The batch with every tensor, at any depth, replaced by the function's value."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: _mapped(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [_mapped(function, value) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
