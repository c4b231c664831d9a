"""Which of our ops a piece of code calls, as a dispatch mode meets them."""

from __future__ import annotations

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class Seen(TorchDispatchMode):
    """Counts our ops that pass the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "compressm":
            self.ops[func._opname] += 1
        return func(*args, **(kwargs or {}))
