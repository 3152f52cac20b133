"""What becomes of the memory that a CPU process frees."""

from __future__ import annotations

import ctypes
import os

# glibc's numbers for mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1  # of an int


def keep_freed_memory() -> None:
    """Let glibc hand freed memory out again instead of returning it to the system.

    A training step frees all its activations; returned to the system, each of their pages costs the next step a fault
    and a page of zeros. The most that the process ever takes stays as it was. Does nothing where MALLOC_TRIM_THRESHOLD_
    is set, or where the allocator is not glibc's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        set_thresholds(trim=_LARGEST, mmap=2**30)


def set_thresholds(*, trim: int, mmap: int) -> None:
    """From how many free bytes glibc returns the heap's end, and from how many it maps an allocation of its own."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_TRIM_THRESHOLD, trim)
    mallopt(_MMAP_THRESHOLD, mmap)
