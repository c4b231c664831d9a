"""Freed memory that stays with the process instead of going back to the system.

Every training step asks for the memory that the last one freed.  glibc gives large blocks and the end of its heap back to the
system at once, which then hands out zeroed pages again, one fault after the other: a fifth of a small model's step.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

from compressm import config

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
KEEP = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}  # no block outside of the heap, and never a shorter heap
DEFAULTS = {MMAP_MAX: 65536, TRIM_THRESHOLD: 128 << 10}  # of mallopt(3)


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Keep what is freed within, up to the most that was ever in use, and give it back at the end.  Does not nest.

    Yields False, and does nothing, where the C library is not glibc or the user's environment variables tune its malloc.
    Afterwards glibc's defaults hold, but for the thresholds that it adapts to a program: they stay as they are.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if not hasattr(libc, "gnu_get_libc_version") or config.tunes_malloc():
        yield False
        return
    _set(libc, KEEP)
    try:
        yield True
    finally:
        _set(libc, DEFAULTS)
        libc.malloc_trim(0)


def _set(libc: ctypes.CDLL, options: dict[int, int]) -> None:
    for option, value in options.items():
        libc.mallopt(option, value)
