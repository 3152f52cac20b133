"""One conversion on many machines: each converts its part of the source, and the parts together are one set.

Every machine lists the whole source, so that all agree on the order; a checksum of that listing is written into each
part's note, by which a loader sees that the parts belong together.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import numpy as np

from data_prep.source import Source
from ijepa_ds.errors import UserError


@dataclass(frozen=True)
class Part:
    """Which part of a source is converted. The keys of ``shard`` in the note."""

    index: int  # from 1 on
    of: int
    first: int  # the part's first sample among those of the whole source
    images: int  # of the whole source
    listing: str  # checksum of the whole source's names and labels


def parse_part(text: str) -> tuple[int, int]:
    """Read "2/16"; raises UserError for anything that is no part."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    index, of = (int(number) for number in match.groups()) if match else (0, 0)
    if not 1 <= index <= of:
        raise UserError(f"--shard is {text}: give i/n with i from 1 to n, such as 2/16 for the second of 16 parts")
    return index, of


def take_part(source: Source, index: int, of: int) -> tuple[Source, Part]:
    """Part ``index`` (from 1 on) of ``of`` nearly equal ones that follow one another."""
    total = len(source)
    if of > total:
        raise UserError(f"--shard {index}/{of} has no images, as there are {total}: give fewer parts")
    first, end = (index - 1) * total // of, index * total // of
    part = Part(index, of, first, total, listing_checksum(source))
    return source.take(np.arange(first, end, dtype=np.int64)), part


def listing_checksum(source: Source) -> str:
    """The sha256 of the names, labels and classes of all images, in order; where the source lies does not matter."""
    digest = hashlib.sha256(source.names.block)
    digest.update(source.names.ends.tobytes())
    for name, values in source.labels.items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    for name in source.class_names:
        digest.update(name.encode("utf-8", errors="surrogateescape") + b"\n")
    return digest.hexdigest()
