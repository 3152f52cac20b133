"""What a .beton holds, read from its header, its metadata and the files beside it, without decoding an image."""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np

from ijepa_ds.data.beton_checksums import tables_problem
from ijepa_ds.data.file_set import Paths, check_set, described, files_of, read_note
from ijepa_ds.data.mapped_files import starts_of
from ijepa_ds.errors import UserError

# FFCV keeps two constants in a dictionary of numba's, which compiles for three seconds and more in every process that
# imports it. No compiled code reads them, so a dictionary of Python's does as well.
with mock.patch("numba.typed.Dict", dict):
    from ffcv.fields import FloatField, IntField, RGBImageField
    from ffcv.reader import Reader

LONGEST_NAME = 4096  # bytes of a path, as Linux allows them


@dataclass(frozen=True)
class BetonFile:
    """What one .beton holds, read from its header."""

    path: str
    num_samples: int
    fields: tuple[tuple[str, str], ...]  # name and FFCV's kind of each
    label_fields: tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    """The images of one .beton or of several, whose samples are counted on from file to file."""

    files: tuple[BetonFile, ...]

    @property
    def num_samples(self) -> int:
        """Images of all files."""
        return sum(file.num_samples for file in self.files)

    @property
    def label_fields(self) -> tuple[str, ...]:
        """Fields beside the image, the same in all files."""
        return self.files[0].label_fields

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the files, in their order."""
        return tuple(file.path for file in self.files)

    @property
    def path(self) -> str:
        """What a sentence calls it: the only file, or the first and how many more there are."""
        return described(self.paths)

    def locate(self, sample: int) -> tuple[str, int]:
        """The file that holds a sample, and its number there."""
        for file in self.files:
            if sample < file.num_samples:
                return file.path, sample
            sample -= file.num_samples
        raise IndexError(sample)


def inspect_dataset(paths: Paths) -> Dataset:
    """Read the headers of the .beton files that ``paths`` name: one, a list, or a pattern with * (sorted by name).

    Raises:
        UserError: a file is missing, truncated or of other fields, its tables are not what its note says was written,
            or the files are no set: a shard is missing, say.
    """
    files = [_inspect_file(Path(path)) for path in files_of(paths)]
    for file in files[1:]:
        if file.fields != files[0].fields:
            here, there = (", ".join(f"{name} ({kind})" for name, kind in one.fields) for one in (file, files[0]))
            raise UserError(
                f"{file.path} has the fields {here}, but {files[0].path} {there}, so they are no set: convert one of "
                f"them again: python data_prep/to_ffcv.py SOURCE {file.path}"
            )
    check_set([file.path for file in files], paths)
    return Dataset(tuple(files))


def _inspect_file(path: Path) -> BetonFile:
    if not path.is_file():
        raise UserError(f"{path} does not exist; make it with: python data_prep/to_ffcv.py SOURCE {path}")
    cure = f"convert it again: python data_prep/to_ffcv.py SOURCE {path}"
    try:
        reader = Reader(str(path))
        table = reader.alloc_table
    except (OSError, ValueError, LookupError, AssertionError, TypeError, MemoryError, OverflowError) as error:
        raise UserError(f"{path} is not a complete .beton ({type(error).__name__}: {error}); {cure}") from error
    if damaged_tables := tables_problem(reader, str(path)):
        raise UserError(f"{path} is damaged: {damaged_tables}; copy both files again, or {cure}")
    end = int((table["ptr"] + table["size"]).max()) if len(table) else 0
    if reader.num_samples == 0 or len(reader.metadata) < reader.num_samples or end == 0:
        raise UserError(f"{path} holds no complete samples; {cure}")
    table_start = int(reader.header["alloc_table_ptr"])
    image_fields = [name for name, field in reader.handlers.items() if isinstance(field, RGBImageField)]
    if image_fields != ["image"]:
        fields = ", ".join(f"{name} ({type(field).__name__})" for name, field in reader.handlers.items())
        raise UserError(f"{path} must have one image field named 'image', but has: {fields}; {cure}")
    pointers = reader.metadata[f"f{list(reader.handlers).index('image')}"]["data_ptr"]
    if end > table_start or not _all_in(pointers, table["ptr"]):
        raise UserError(f"{path} is truncated or damaged: images lie outside of its data region; {cure}")
    labels = tuple(name for name, field in reader.handlers.items() if isinstance(field, (IntField, FloatField)))
    kinds = tuple((name, type(field).__name__) for name, field in reader.handlers.items())
    return BetonFile(str(path), int(reader.num_samples), kinds, labels)


def _all_in(wanted: np.ndarray, known: np.ndarray) -> bool:
    """Whether each of ``wanted`` is among ``known``; for millions a third of the time of numpy's ``isin``."""
    wanted, known = np.sort(wanted), np.sort(known)
    places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return bool((known[places] == wanted).all())


class Tables:
    """Where each sample of a data set is and how large: what FFCV's loader asks of its Reader, over all files.

    ``metadata``: FFCV's rows, [num_samples], whose ``data_ptr`` is the place in the range of ``map_files``;
    ``ptrs`` and ``sizes``: places and lengths of all stored images, uint64 in ascending order of place.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.paths, self.num_samples = dataset.paths, dataset.num_samples
        metadata, ptrs, sizes = [], [], []
        for path, start in zip(dataset.paths, starts_of(dataset.paths), strict=False):
            reader = Reader(path)
            rows = np.array(reader.metadata)
            rows[_column(reader, "image")]["data_ptr"] += np.uint64(start)
            order = np.argsort(reader.alloc_table["ptr"])
            metadata.append(rows)
            ptrs.append(reader.alloc_table["ptr"][order] + np.uint64(start))
            sizes.append(reader.alloc_table["size"][order])
            self.handlers = reader.handlers
        self.metadata, self.ptrs, self.sizes = _joined(metadata), _joined(ptrs), _joined(sizes)
        self.metadata.setflags(write=False)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _column(reader: Reader, field: str) -> str:
    return f"f{list(reader.handlers).index(field)}"


def read_labels(dataset: Dataset, field: str) -> np.ndarray:
    """All labels of a field, [num_samples], straight from the files' metadata."""
    readers = map(Reader, dataset.paths)
    return np.concatenate([np.array(reader.metadata[_column(reader, field)]).reshape(-1) for reader in readers])


def integer_label_fields(dataset: Dataset) -> tuple[str, ...]:
    """The label fields that hold classes."""
    return tuple(name for name, kind in dataset.files[0].fields if kind == IntField.__name__)


def image_sizes(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Heights and widths of all images as they are stored, each [num_samples], pixels."""
    readers = map(Reader, dataset.paths)
    images = np.concatenate([reader.metadata[_column(reader, "image")][["height", "width"]] for reader in readers])
    return np.array(images["height"]), np.array(images["width"])


def class_names(dataset: Dataset) -> list[str]:
    """The names of the classes of ``label``, class k the k-th; empty where no note beside the files has them."""
    return next(filter(None, (read_note(path).get("class_names") for path in dataset.paths)), [])


def read_names(dataset: Dataset) -> list[str]:
    """The path below SOURCE of the file that each sample came from, as data_prep/to_ffcv.py wrote it.

    Raises:
        UserError: a file of names is missing, damaged or of another .beton.
    """
    return [name for file in dataset.files for name in _names_of(file)]


def _names_of(file: BetonFile) -> list[str]:
    path = Path(f"{file.path}.names.gz")
    if not path.is_file():
        raise UserError(
            f"{path} is missing, so files cannot be found by name: copy it along with {file.path}, or, where that "
            "was made before data_prep/to_ffcv.py wrote names, convert it again"
        )
    try:
        with gzip.open(path) as names:
            text = names.read(LONGEST_NAME * file.num_samples + 1)  # a few kB could become a terabyte
        lines = text.split(b"\n")[:-1]  # the last line ends in a line break too
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): convert {file.path} again") from error
    if len(lines) != file.num_samples:
        raise UserError(
            f"{path} names {len(lines)} files for the {file.num_samples} samples of {file.path}: convert it again"
        )
    return [os.fsdecode(line) for line in lines]
