"""What a .beton holds, read from its header, its metadata and the files beside it, without decoding an image."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from ijepa_ds.errors import UserError

# FFCV keeps two constants in a dictionary of numba's, which compiles for three seconds and more in every process that
# imports it. No compiled code reads them, so a dictionary of Python's does as well.
with mock.patch("numba.typed.Dict", dict):
    from ffcv.fields import FloatField, IntField, RGBImageField
    from ffcv.reader import Reader


@dataclass(frozen=True)
class Dataset:
    """What a .beton holds, read from its header."""

    path: str
    num_samples: int
    label_fields: tuple[str, ...]


def inspect_dataset(path: str | os.PathLike) -> Dataset:
    """Read the header of a .beton and refuse one that is missing, truncated or of other fields (:class:`UserError`)."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; make it with: python data_prep/to_ffcv.py SOURCE {path}")
    cure = f"convert it again: python data_prep/to_ffcv.py SOURCE {path}"
    try:
        reader = Reader(str(path))
        table = reader.alloc_table
    except (OSError, ValueError, LookupError, AssertionError, TypeError, MemoryError, OverflowError) as error:
        raise UserError(f"{path} is not a complete .beton ({type(error).__name__}: {error}); {cure}") from error
    end = int((table["ptr"] + table["size"]).max()) if len(table) else 0
    if reader.num_samples == 0 or len(reader.metadata) < reader.num_samples or end == 0:
        raise UserError(f"{path} holds no complete samples; {cure}")
    table_start = int(reader.header["alloc_table_ptr"])
    image_fields = [name for name, field in reader.handlers.items() if isinstance(field, RGBImageField)]
    if image_fields != ["image"]:
        fields = ", ".join(f"{name} ({type(field).__name__})" for name, field in reader.handlers.items())
        raise UserError(f"{path} must have one image field named 'image', but has: {fields}; {cure}")
    pointers = reader.metadata[f"f{list(reader.handlers).index('image')}"]["data_ptr"]
    if end > table_start or not np.isin(pointers, table["ptr"]).all():
        raise UserError(f"{path} is truncated or damaged: images lie outside of its data region; {cure}")
    labels = tuple(name for name, field in reader.handlers.items() if isinstance(field, (IntField, FloatField)))
    return Dataset(str(path), int(reader.num_samples), labels)


def read_labels(dataset: Dataset, field: str) -> np.ndarray:
    """All labels of a field, [num_samples], straight from the file's metadata."""
    reader = Reader(dataset.path)
    return np.array(reader.metadata[f"f{list(reader.handlers).index(field)}"]).reshape(-1)


def integer_label_fields(dataset: Dataset) -> tuple[str, ...]:
    """The label fields that hold classes."""
    fields = Reader(dataset.path).handlers
    return tuple(name for name in dataset.label_fields if isinstance(fields[name], IntField))


def image_sizes(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Heights and widths of all images as they are stored, each [num_samples], pixels."""
    reader = Reader(dataset.path)
    images = reader.metadata[f"f{list(reader.handlers).index('image')}"]
    return np.array(images["height"]), np.array(images["width"])


def read_note(path: str) -> dict[str, Any]:
    """What data_prep/to_ffcv.py wrote beside a .beton; empty where it did not."""
    try:
        note = json.loads(Path(f"{path}.json").read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def read_names(dataset: Dataset) -> list[str]:
    """The path below SOURCE of the file that each sample came from, as data_prep/to_ffcv.py wrote it.

    Raises:
        UserError: the file of names is missing, damaged or of another .beton.
    """
    path = Path(f"{dataset.path}.names.gz")
    if not path.is_file():
        raise UserError(
            f"{path} is missing, so files cannot be found by name: copy it along with {dataset.path}, or, where that "
            "was made before data_prep/to_ffcv.py wrote names, convert it again"
        )
    try:
        lines = gzip.decompress(path.read_bytes()).split(b"\n")[:-1]  # the last line ends in a line break too
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): convert {dataset.path} again") from error
    if len(lines) != dataset.num_samples:
        raise UserError(
            f"{path} names {len(lines)} files for the {dataset.num_samples} samples of {dataset.path}: convert it again"
        )
    return [os.fsdecode(line) for line in lines]
