"""Checksums of a .beton: of its tables in the note beside it, of each stored image in FILE.beton.crc32.

``checksums`` in the note holds two CRC-32 as 8 hexadecimal digits: ``tables``, of everything in the file that says
where and what the images are, and ``images``, of FILE.beton.crc32, which is one little-endian uint32 for each sample,
the CRC-32 of its stored bytes (5 MB for ImageNet's train split). Files of earlier versions have neither.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ijepa_ds.data.file_set import read_note

IMAGE_CHECKSUM = np.dtype("<u4")


class Reader(Protocol):
    """FFCV's reader, as far as it matters."""

    header: np.ndarray
    field_descriptors: np.ndarray
    metadata: np.ndarray
    alloc_table: np.ndarray


class DamagedChecksums(Exception):
    """The message says why the checksums of the images cannot be believed."""


def checksums_path(beton: str) -> str:
    """Where the checksums of the images are."""
    return beton + ".crc32"


def tables_checksum(reader: Reader) -> str:
    """The CRC-32 of all that is no image: header, descriptions of the fields, metadata and allocation table."""
    value = zlib.crc32(reader.header.tobytes())
    for table in (reader.field_descriptors, reader.metadata, reader.alloc_table):
        value = zlib.crc32(table.view(np.uint8).data, value)
    return f"{value:08x}"


def checksums_of(note: dict[str, Any]) -> dict[str, str]:
    """What a note says; empty for a file of an earlier version."""
    return note.get("checksums") or {}


def tables_problem(reader: Reader, path: str) -> str | None:
    """What is wrong with a file's tables, where its note tells; for millions of images this takes milliseconds."""
    written = checksums_of(read_note(path)).get("tables")
    if written is None or written == tables_checksum(reader):
        return None
    return (
        "its tables, which say where the images are and what their labels, are not what was written (their checksum "
        f"differs from that in {path}.json)"
    )


def read_checksums(path: str, num_samples: int) -> np.ndarray | None:
    """The CRC-32 of each stored image, uint32 [num_samples]; None for a file of an earlier version.

    Raises:
        DamagedChecksums: they are missing, or not what was written.
    """
    written = checksums_of(read_note(path)).get("images")
    if written is None:
        return None
    file = checksums_path(path)
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise DamagedChecksums(f"{file} cannot be read ({error.strerror or error})") from error
    if f"{zlib.crc32(content):08x}" != written or len(content) != num_samples * IMAGE_CHECKSUM.itemsize:
        raise DamagedChecksums(f"{file} is not what was written")
    return np.frombuffer(content, IMAGE_CHECKSUM)
