"""Images inside uncompressed tar files, which are read in place.

Members are listed once as (tar, offset, size); each worker then reads them with ``os.pread`` from a descriptor of its
own.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from data_prep.source import Source, check_file_size
from ijepa_ds.errors import UserError
from ijepa_ds.files import read_at


class Place(NamedTuple):
    """Where a member is."""

    tar: int  # of the tars
    offset: int  # bytes
    size: int  # bytes


@dataclass
class TarSource(Source):
    """Images inside ``tars``; ``places`` says where, uint64 [num_samples, 3] with the columns of :class:`Place`."""

    tars: Sequence[str] = ()
    places: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.uint64))
    _opened: tuple[int, int, int] | None = None  # (process, tar, descriptor): a forked worker opens its own

    def read(self, index: int) -> bytes:
        tar, offset, size = map(int, self.places[index])
        check_file_size(size)
        return read_at(self._descriptor(tar), size, offset)

    def _descriptor(self, tar: int) -> int:
        """Of the tar that was read last, as samples lie one after the other; thousands of tars may not all be open."""
        process = os.getpid()
        if self._opened is None or self._opened[:2] != (process, tar):
            if self._opened is not None and self._opened[0] == process:
                os.close(self._opened[2])
            self._opened = None
            self._opened = (process, tar, os.open(self.tars[tar], os.O_RDONLY))
        return self._opened[2]

    def take(self, indices: np.ndarray) -> TarSource:
        return replace(super().take(indices), places=self.places[indices], _opened=None)


def places_of(places: Sequence[Place]) -> np.ndarray:
    """The table of a :class:`TarSource`."""
    return np.array(places, dtype=np.uint64).reshape(-1, 3)


@contextmanager
def opened_tar(path: str) -> Iterator[tarfile.TarFile]:
    """An uncompressed tar file; what is none, or damaged, is refused (:class:`UserError`)."""
    try:
        with tarfile.open(path, "r:") as tar:
            _check_end(path)
            yield tar
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read as an uncompressed tar file ({error}): SOURCE is a folder or one of the files that "
            "docs/data.md lists; unpack any other archive, and download a damaged one again"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}): mend that and start again") from error


def _check_end(path: str) -> None:
    """A tar ends in blocks of zeros. Python takes one that was cut before or within a header for a whole one."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - tarfile.BLOCKSIZE))
        if any(end := file.read()) or len(end) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it has no end, so it was cut")
