"""A user's data loader, asked for calibration batches in the middle of an epoch, goes on as if nobody had asked."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from compressm.compression.planning.batches import Replay
from compressm.errors import DataError

CONTAINERS = (dict, list, set, deque)
LEAVES = (Tensor, np.ndarray, nn.Module, ModuleType, type, str, bytes, _BaseDataLoaderIter)
LONGEST = 1000  # containers with more items are data
MOST = 10_000  # objects looked at


@contextmanager
def at_rest(batches: Any) -> Iterator[None]:
    """``batches`` may be iterated meanwhile; afterwards whatever hands them out is as it was.

    A DataLoader, inside of another loader as well, works with an iterator of its own and with copies of its samplers and its
    generator.  Of all objects that can be reached from ``batches``, datasets and their transforms among them, attributes, short
    containers and random generators are put back.  An iterator is left alone: what it gave is gone.

    Raises:
        DataError: a sampler cannot be copied.
    """
    objects = [] if isinstance(batches, Iterator | Replay) else _reachable(batches)
    restore = [action for item in objects if (action := _remembered(item)) is not None]
    loaders = [item for item in objects if isinstance(item, DataLoader)]
    shared = [item for item in objects if isinstance(item, Dataset)] + [loader.dataset for loader in loaders]
    try:
        for loader in loaders:
            vars(loader).update(_own_parts(loader, shared))
        yield
    finally:
        for action in restore:
            action()


def _own_parts(loader: DataLoader, shared: list[Any]) -> dict[str, Any]:
    """What a DataLoader needs to begin an epoch without touching the one under way."""
    parts = {name: getattr(loader, name) for name in ("sampler", "batch_sampler", "generator")}
    try:
        parts = copy.deepcopy(parts, {id(item): item for item in shared})
    except Exception as error:
        sampler = type(parts["sampler"] if parts["batch_sampler"] is None else parts["batch_sampler"]).__name__
        raise DataError(
            f"calibration: the {sampler} of a DataLoader cannot be copied ({error}), expected one that can, so that measuring "
            "does not disturb the epoch under way. Pass a list of batches, such as list(itertools.islice(loader, 4))"
        ) from error
    return parts | {"persistent_workers": False, "_iterator": None}


def _reachable(root: Any) -> list[Any]:
    """The objects that ``root`` consists of, without their data; those near to it first."""
    found: dict[int, Any] = {}
    queue = deque([root])
    while queue and len(found) < MOST:
        item = queue.popleft()
        if id(item) not in found and not isinstance(item, LEAVES):
            found[id(item)] = item
            queue.extend(_parts(item))
    return list(found.values())


def _parts(item: Any) -> list[Any]:
    if isinstance(item, dict | list | tuple | set | deque):
        values = item.values() if isinstance(item, dict) else item
        return list(values) if len(item) <= LONGEST else []
    if isinstance(item, partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, MethodType):
        return [item.__self__]
    if isinstance(item, FunctionType):
        cells = [cell.cell_contents for cell in item.__closure__ or ()]
        return [*cells, *(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values()]
    return list(getattr(item, "__dict__", {}).values())


def _remembered(item: Any) -> Callable[[], Any] | None:
    """How to give an object the state back that it has now; None if it has none."""
    if isinstance(item, torch.Generator):
        return partial(item.set_state, item.get_state())
    if isinstance(item, random.Random):
        return partial(item.setstate, item.getstate())
    if isinstance(item, np.random.RandomState):
        return partial(item.set_state, item.get_state())
    if isinstance(item, np.random.Generator):
        return partial(setattr, item.bit_generator, "state", item.bit_generator.state)
    if type(item) in CONTAINERS:
        return partial(_refill, item, copy.copy(item)) if len(item) <= LONGEST else None
    if isinstance(getattr(item, "__dict__", None), dict):
        return partial(_refill, vars(item), dict(vars(item)))
    return None


def _refill(container: Any, before: Any) -> None:
    """The content of before, if another is there now."""
    if isinstance(container, dict):
        for key in container.keys() - before.keys():
            del container[key]
        container.update(before)
    elif len(container) != len(before) or any(now is not then for now, then in zip(container, before, strict=True)):
        container.clear()
        container.update(before) if isinstance(container, set) else container.extend(before)
