"""Tables of images: Parquet and Arrow files, and folders that `datasets` saved (``save_to_disk``), read by pyarrow.

The layout is that of Hugging Face's data sets: a column with the bytes of the images' files (or a struct of ``bytes``
and ``path``), and columns of labels, whose class names the files' own metadata has. Files are read chunk by chunk, a
chunk being a row group of Parquet or a record batch of Arrow; a worker keeps the last one, as samples lie one after the
other.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from data_prep.source import PackedNames, Source
from ijepa_ds.errors import UserError, some
from ijepa_ds.validation import Checked, check, is_path, must, parse_json, read_json

PARQUET, ARROW = ".parquet", ".arrow"
LABELS = ("label", "labels")  # columns that are labels also where no metadata says so
LONGEST_FIELD = 16  # bytes that FFCV keeps of a field's name
Saved = TypeVar("Saved", bound=BaseModel)
FileName = Annotated[
    str, must(lambda name: is_path(name) and Path(name).name == name and name != "..", "must be a plain file name")
]  # nothing outside of the folder is read


class _Said(Checked):
    """What `datasets` wrote, as far as it matters here."""

    model_config = ConfigDict(extra="ignore")


class _Splits(_Said):
    splits: list[FileName] = Field(default=[])


class _File(_Said):
    filename: FileName


class _State(_Said):
    files: list[_File] = Field(default=[], alias="_data_files")
    indices: list[Any] | None = Field(default=None, alias="_indices_data_files")


class _Info(_Said):
    features: dict[str, Any]


class _Schema(_Said):
    info: _Info


def pyarrow(module: str = "pyarrow") -> Any:
    """The library, which is an optional one; a sentence with the cure where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            "Parquet, Arrow and `datasets` files are read with pyarrow, which is not installed: pip install pyarrow "
            "(or, in the checkout, pip install '.[sources]')"
        ) from error


class ParquetTable:
    """One Parquet file, chunk by chunk."""

    def __init__(self, path: str) -> None:
        self.file = pyarrow("pyarrow.parquet").ParquetFile(path)
        self.schema = self.file.schema_arrow
        self.chunk_sizes = [self.file.metadata.row_group(k).num_rows for k in range(self.file.metadata.num_row_groups)]

    def read(self, chunk: int, column: str) -> Any:
        """A column's values in a chunk; ``column`` may be a struct's child, ``image.path``, which is read alone."""
        # Without threads: workers are forked, and there is one for each core.
        table = self.file.read_row_group(chunk, columns=[column], use_threads=False)
        return _child(table.column(0), column)


class ArrowTable:
    """One Arrow file, as a stream (as `datasets` writes it) or with a footer; mapped, so that little is read."""

    def __init__(self, path: str) -> None:
        pa = pyarrow()
        mapped = pa.memory_map(path)
        try:
            reader = pa.ipc.open_stream(mapped)
            self.batches = list(reader)
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(mapped)
            self.batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self.schema = reader.schema
        self.chunk_sizes = [batch.num_rows for batch in self.batches]

    def read(self, chunk: int, column: str) -> Any:
        """As :meth:`ParquetTable.read`."""
        return _child(self.batches[chunk].column(column.partition(".")[0]), column)


def _child(values: Any, column: str) -> Any:
    """The values of ``image.path`` in a column ``image``, or of a column as it is."""
    child = column.partition(".")[2]
    return pyarrow("pyarrow.compute").struct_field(values, child) if child else values


def open_table(path: str) -> ParquetTable | ArrowTable:
    return ParquetTable(path) if path.endswith(PARQUET) else ArrowTable(path)


@dataclass
class TableSource(Source):
    """Images in a column of ``files``. Chunks and rows are counted on from file to file."""

    files: Sequence[str] = ()
    column: str = ""
    chunks: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))  # file, number in it, first row
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # of each sample, [num_samples]
    _kept: tuple[int, Any] | None = None  # (chunk, its images)

    def read(self, index: int) -> bytes:
        row = int(self.rows[index])
        chunk = int(np.searchsorted(self.chunks[:, 2], row, side="right")) - 1
        if self._kept is None or self._kept[0] != chunk:
            self._kept = None  # not two of them in memory
            self._kept = chunk, self._read_chunk(chunk)
        value = self._kept[1][row - int(self.chunks[chunk, 2])].as_py()
        if not isinstance(value, dict):
            return value or b""
        if value["bytes"] is None and value.get("path"):  # the table only names its images
            folder = os.path.dirname(self.files[int(self.chunks[chunk, 0])])
            with open(os.path.join(folder, value["path"]), "rb") as file:
                return file.read()
        return value["bytes"] or b""

    def _read_chunk(self, chunk: int) -> Any:
        file, number, _ = map(int, self.chunks[chunk])
        try:
            return open_table(self.files[file]).read(number, self.column)
        except pyarrow().ArrowException as error:
            raise OSError(f"damaged part of {self.files[file]}: {error}") from error

    def take(self, indices: np.ndarray) -> TableSource:
        return replace(super().take(indices), rows=self.rows[indices], _kept=None)


def open_tables(root: str, files: Sequence[str], *, labelled: bool) -> Source:
    """The images of all Parquet or Arrow ``files``, one after the other.

    Raises:
        UserError: pyarrow is not installed, a file cannot be read, the files differ in their columns, or there is no
            column of images.
    """
    pa = pyarrow()
    try:
        schema = open_table(files[0]).schema
        features = _features(schema)
        image = _image_column(schema, features, files[0])
        labels = _label_columns(schema, features) if labelled else {}
        return _list_rows(root, files, image, labels, features)
    except (pa.ArrowException, OSError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{root} cannot be read ({why}): get the damaged file again") from error


def _list_rows(
    root: str, files: Sequence[str], image: str, labels: dict[str, str], features: dict[str, Any]
) -> TableSource:
    chunks: list[tuple[int, int, int]] = []
    names: list[str] = []
    values: dict[str, list[np.ndarray]] = {name: [np.zeros(0, np.int64)] for name in labels}
    schema = open_table(files[0]).schema
    for number, path in enumerate(files):
        table = open_table(path)
        for column in (image, *labels.values()):
            if column not in table.schema.names or table.schema.field(column).type != schema.field(column).type:
                raise UserError(f"{path} has not the column '{column}' of {files[0]}: give the files of one data set")
        for chunk, size in enumerate(table.chunk_sizes):
            chunks.append((number, chunk, len(names)))
            names += _names(table, chunk, image, os.path.basename(path), size)
            for name, column in labels.items():
                values[name].append(_numbers(table.read(chunk, column), path, column))
    kind = f"{'Parquet' if files[0].endswith(PARQUET) else 'Arrow'} tables"
    arrays = {name: np.concatenate(parts) for name, parts in values.items()}
    classes = features.get(labels.get("label", ""), {}).get("names") or []
    table_of_chunks = np.array(chunks, np.int64).reshape(-1, 3)
    rows = np.arange(len(names))
    source = TableSource(kind, root, PackedNames(names), arrays, classes)
    return replace(source, files=list(files), column=image, chunks=table_of_chunks, rows=rows)


def _features(schema: Any) -> dict[str, Any]:
    """What `datasets` wrote of the columns: {"label": {"_type": "ClassLabel", "names": [...]}, ...}."""
    try:
        said, _ = check(_Schema, parse_json((schema.metadata or {})[b"huggingface"]))
    except (KeyError, ValueError):
        return {}
    if said is None:
        return {}
    return {name: value for name, value in said.info.features.items() if isinstance(value, dict) and _has_names(value)}


def _has_names(feature: dict[str, Any]) -> bool:
    """Whether the names of a feature's classes, if it has any, are names."""
    names = feature.get("names") or []
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _image_column(schema: Any, features: dict[str, Any], path: str) -> str:
    """The column of images: what the metadata says, else one of bytes or of a struct with bytes."""
    types = pyarrow("pyarrow.types")

    def holds_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            kind = next((kind.field(k).type for k in range(kind.num_fields) if kind.field(k).name == "bytes"), kind)
        return types.is_binary(kind) or types.is_large_binary(kind)

    columns = [column.name for column in schema if holds_bytes(column.type)]
    said = [name for name in columns if features.get(name, {}).get("_type") == "Image"]
    found = said or columns
    if "image" in found:
        return "image"
    if len(found) != 1:
        raise UserError(
            f"{path} has {'no column' if not found else 'several columns'} of image bytes (its columns: "
            f"{some(schema.names)}): call the one that is meant 'image'"
        )
    return found[0]


def _label_columns(schema: Any, features: dict[str, Any]) -> dict[str, str]:
    """Field of the .beton -> column. One column of classes is `label`, whatever it is called; several keep theirs."""
    types = pyarrow("pyarrow.types")
    classes = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    columns = classes or [name for name in LABELS if name in schema.names]
    columns = [name for name in columns if types.is_integer(schema.field(name).type)]
    if len(columns) == 1:
        return {"label": columns[0]}
    return {name.encode()[:LONGEST_FIELD].decode(errors="ignore"): name for name in columns}


def _names(table: ParquetTable | ArrowTable, chunk: int, image: str, file: str, size: int) -> list[str]:
    """FILE/PATH of each row where the table has paths, else FILE/NUMBER."""
    kind = table.schema.field(image).type
    paths: list[str | None] = [None] * size
    if pyarrow("pyarrow.types").is_struct(kind) and any(kind.field(k).name == "path" for k in range(kind.num_fields)):
        paths = table.read(chunk, f"{image}.path").to_pylist()
    first = sum(table.chunk_sizes[:chunk])
    return [f"{file}/{(path or f'{first + row:08d}').lstrip('/')}" for row, path in enumerate(paths)]


def _numbers(column: Any, path: str, name: str) -> np.ndarray:
    if column.null_count:
        raise UserError(f"{path} has rows without '{name}': give --no-labels, or a table that has them all")
    return np.asarray(column.to_numpy(zero_copy_only=False) if hasattr(column, "type") else column, np.int64)


def saved_files(folder: str) -> list[str] | None:
    """The Arrow files of a folder that `datasets` saved, in order; None for any other folder.

    Raises:
        UserError: the folder holds several splits, or rows that were selected and not written out.
    """
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        splits = _read(_Splits, folder, "dataset_dict.json").splits
        raise UserError(
            f"{folder} holds the splits {some(splits)} of a data set: give one of them as SOURCE, such as "
            f"{os.path.join(folder, *splits[:1])}"
        )
    if not os.path.isfile(os.path.join(folder, "state.json")):
        return None
    state = _read(_State, folder, "state.json")
    if state.indices:
        raise UserError(f"{folder} was saved with a selection of rows: save it anew after flatten_indices()")
    return [os.path.join(folder, file.filename) for file in state.files]


def _read(model: type[Saved], folder: str, name: str) -> Saved:
    complaint = "is not what `datasets` writes; get the data set again"
    return read_json(model, Path(folder, name), complaint, "get the data set again")
