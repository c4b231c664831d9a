"""Layers side by side, each on one thread.

Decompositions of a few hundred rows gain little from several threads inside, and lose a factor of a hundred where other
processes keep a core busy, because OpenMP threads wait for each other spinning.  Several layers at a time use all cores
without any waiting, and the result does not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Key = TypeVar("Key")
Item = TypeVar("Item")
Result = TypeVar("Result")


def each(function: Callable[[Key, Item], Result], items: Mapping[Key, Item]) -> dict[Key, Result]:
    """``{key: function(key, item)}``, as many calls at a time as torch has CPU threads, each with one thread inside.

    The number of torch's threads is as before afterwards.  The first error in the order of ``items`` is raised.
    """
    threads = torch.get_num_threads()
    count = max(1, min(threads, len(items)))
    try:
        with ThreadPoolExecutor(count, "compressm", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return dict(zip(items, pool.map(function, items.keys(), items.values()), strict=True))
    finally:
        torch.set_num_threads(threads)
