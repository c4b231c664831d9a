"""Freed memory that stays with the process instead of going back to the system.

Every training step asks for the memory that the last one freed.  glibc gives large blocks and the end of its heap back to the
system at once, which then hands out zeroed pages again, one fault after the other: a fifth of a small model's step.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

from compressm import config

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
KEEP = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}  # no block outside of the heap, and never a shorter heap
LARGE_PAGE = 2 << 20
DEFAULTS = {MMAP_MAX: 65536, TRIM_THRESHOLD: 128 << 10}  # of mallopt(3)


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Keep what is freed within, up to the most that was ever in use, and give it back at the end.  Does not nest.

    Yields False, and does nothing, where the C library is not glibc or the user's environment variables tune its malloc.
    Afterwards glibc's defaults hold, but for the thresholds that it adapts to a program: they stay as they are.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if libc is None or not hasattr(libc, "gnu_get_libc_version") or config.tunes_malloc():
        yield False
        return
    _set(libc, KEEP)
    _lay_on_large_pages(libc)
    try:
        yield True
    finally:
        _set(libc, DEFAULTS)
        libc.malloc_trim(0)


def _lay_on_large_pages(libc: ctypes.CDLL) -> None:
    """Make the heap half as large as the machine's memory, of which nothing is touched, and ask for large pages there.

    Without effect where the address space is limited or the system has no large pages.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = (ctypes.c_size_t,), (ctypes.c_void_p,)
    libc.sbrk.argtypes, libc.madvise.argtypes = (ctypes.c_ssize_t,), (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    block = libc.malloc(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    first, end = -(-(block or 0) // LARGE_PAGE) * LARGE_PAGE, libc.sbrk(0)
    if block and first < end:
        libc.madvise(first, end - first, mmap.MADV_HUGEPAGE)
    libc.free(block)


def _set(libc: ctypes.CDLL, options: dict[int, int]) -> None:
    for option, value in options.items():
        libc.mallopt(option, value)
