"""Images in a fixed order with their labels, and which file names are images."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

AnySource = TypeVar("AnySource", bound="Source")
MOST_BYTES = 1 << 30  # of an image's file
IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
}


def check_file_size(size: int) -> None:
    """Raise OSError for a file of more bytes than an image has, before it is read into memory."""
    if size > MOST_BYTES:
        raise OSError(errno.EFBIG, f"its file has {size:,} bytes, more than the {MOST_BYTES:,} that an image may have")


class PackedNames:
    """Names as one block of bytes plus where each ends: a tenth of the memory of a list of ``str``."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.block = b"".join(encoded)
        self.ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.block[start : self.ends[index]])

    def take(self, indices: np.ndarray) -> PackedNames:
        return PackedNames([self[int(index)] for index in indices])


@dataclass
class Source:
    """Images in a fixed order with their labels (field name -> array ``[num_samples]``, int64 or float64)."""

    kind: str
    root: str
    names: PackedNames
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        """The bytes of one image's file. Raises OSError."""
        with open(os.path.join(self.root, self.names[index]), "rb") as file:
            check_file_size(os.fstat(file.fileno()).st_size)
            return file.read()

    def take(self: AnySource, indices: np.ndarray) -> AnySource:
        """The samples ``indices`` only, in that order."""
        labels = {name: values[indices] for name, values in self.labels.items()}
        return replace(self, names=self.names.take(indices), labels=labels)

    def without_labels(self) -> Source:
        return replace(self, labels={}, class_names=[])


def why_ignored(name: str) -> str | None:
    """What a file is counted as that is not converted: hidden, or its suffix. None for an image."""
    if os.path.basename(name).startswith("."):
        return "hidden"
    suffix = os.path.splitext(name)[1].lower()
    return None if suffix in IMAGE_SUFFIXES else suffix or "no suffix"
