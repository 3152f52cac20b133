"""Several files in memory one behind the other, so that one number says where a byte of any of them is.

FFCV's compiled code reads from one array. The files of a set are mapped into one range of addresses, each from a page
of its own on; nothing is read or copied, and the range itself takes no memory.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

import numpy as np

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64)
_LIBC.mmap.restype = ctypes.c_void_p
_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED = 0x10  # Linux: exactly at that address, over what was mapped there


def starts_of(paths: Sequence[str]) -> list[int]:
    """At which byte of the range each file begins, and where the last one ends: len(paths) + 1 whole pages."""
    starts = [0]
    for path in paths:
        starts.append(starts[-1] + -(-os.path.getsize(path) // mmap.PAGESIZE) * mmap.PAGESIZE)
    return starts


def map_files(paths: Sequence[str]) -> np.ndarray:
    """The bytes of all files at :func:`starts_of`, uint8 [bytes], read-only; unmapped when nothing holds it any more.

    Raises:
        OSError: a file cannot be opened, or the address space is too small.
    """
    starts = starts_of(paths)
    reserved = mmap.mmap(-1, starts[-1], flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    whole = np.frombuffer(reserved, np.uint8)
    for path, start in zip(paths, starts, strict=False):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            address, size = whole.ctypes.data + start, os.fstat(descriptor).st_size
            if _LIBC.mmap(address, size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0) == _FAILED:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), path)
        finally:
            os.close(descriptor)
    return whole
