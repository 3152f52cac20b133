"""A .beton back into files: JPEGs as they are stored, raw images as PNG, and all labels in a table.

With class labels the files lie in a folder for each class, which ``to_ffcv.py`` converts to the same labels in the same
order; FFCV is needed for neither the folder nor the table.
"""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import ijepa_ds.data  # noqa: F401  # isort: skip  # before ffcv, which then imports in no time
import cv2
import numpy as np
from ffcv.reader import Reader

from data_prep.beton_check import SPAN, DamagedSample, Samples
from data_prep.folders import SPLIT_NAMES
from data_prep.images import JPG, EncodedImage
from data_prep.sidecar import names_path
from ijepa_ds.data.beton import BetonFile, Dataset, class_names, inspect_dataset, read_labels, read_names
from ijepa_ds.data.beton_checksums import DamagedChecksums, read_checksums
from ijepa_ds.errors import UserError
from ijepa_ds.progress import Progress

LABELS = "labels.csv"
MOST_CLASSES = 100_000  # a folder for each; labels beyond are no classes


def unpack(given: str, folder: str, *, num_workers: int) -> int:
    """Write the images of ``given`` (a .beton, or a pattern of several) into a new ``folder``; the exit code.

    Raises:
        UserError: there is no such set, the folder is there already, the disk is too small, or a sample is damaged.
    """
    dataset = inspect_dataset(given)
    samples = [Samples(Reader(file.path), file.path, _checksums(file)) for file in dataset.files]
    if os.path.exists(folder):
        raise UserError(f"{folder} exists already: give another name for --unpack")
    target = os.path.abspath(folder)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    needed, free = sum(int(part.sizes.sum()) for part in samples), shutil.disk_usage(os.path.dirname(target)).free
    if needed > free:
        raise UserError(f"{folder} needs {needed / 1e9:,.2f} GB, but {free / 1e9:,.2f} are free: make room")
    places = _Places(dataset)
    try:
        with _appearing(target) as root:
            for name in places.folders:
                (root / name).mkdir()
            files = _write_images(dataset, samples, places, root, num_workers)
            _write_labels(dataset, files, root / LABELS)
    except OSError as error:
        raise UserError(
            f"cannot write {folder} ({error.strerror or error}): mend that or choose another place"
        ) from error
    layout = f" in {len(places.folders):,} class folders" if places.folders else ""
    print(f"{folder}: {dataset.num_samples:,} images{layout}, labels and names in {LABELS}")
    return 0


def _checksums(file: BetonFile) -> np.ndarray | None:
    try:
        return read_checksums(file.path, file.num_samples)
    except DamagedChecksums as damaged:
        raise UserError(f"{damaged}, so the images cannot be checked: copy that file again") from damaged


@contextmanager
def _appearing(target: str) -> Iterator[Path]:
    """A folder that has its name when the block is left, and is removed after an error."""
    root = Path(f"{target}.partial-{os.getpid()}")
    root.mkdir()
    try:
        yield root
        os.rename(root, target)
    finally:
        shutil.rmtree(root, ignore_errors=True)


class _Places:
    """Where each sample is written: [CLASS/]NUMBER, whose order by name is that of the samples of a class."""

    def __init__(self, dataset: Dataset) -> None:
        self.width = max(8, len(str(dataset.num_samples - 1)))
        self.folders: list[str] = []
        if ("label", "IntField") not in dataset.files[0].fields:
            return
        self.labels = read_labels(dataset, "label")
        names = class_names(dataset)
        num_classes = max(len(names), int(self.labels.max()) + 1)
        if self.labels.min() >= 0 and num_classes <= MOST_CLASSES:
            plain = len(names) == num_classes and _can_be_folders(names)
            self.folders = names if plain else [f"{label:05d}" for label in range(num_classes)]

    def of(self, sample: int) -> str:
        """The path of a sample below the folder, without its suffix."""
        number = f"{sample:0{self.width}d}"
        return f"{self.folders[self.labels[sample]]}/{number}" if self.folders else number


def _can_be_folders(names: list[str]) -> bool:
    """Whether folders of these names, which are sorted by name when they are converted, would have the same numbers."""
    plain = all(
        name and not name.startswith(".") and "/" not in name and len(os.fsencode(name)) < 256 for name in names
    )
    return plain and names == sorted(set(names)) and not SPLIT_NAMES.issuperset(name.lower() for name in names)


def _write_images(dataset: Dataset, samples: list[Samples], places: _Places, root: Path, num_workers: int) -> list[str]:
    """Write all images; their paths below ``root``, in order."""
    files: list[str] = []
    progress = Progress(dataset.num_samples)
    for path, part in zip(dataset.paths, samples, strict=True):
        first, descriptor = len(files), os.open(path, os.O_RDONLY)
        pool = ThreadPoolExecutor(num_workers)
        try:
            spans = [range(start, min(start + SPAN, len(part))) for start in range(0, len(part), SPAN)]
            for written in pool.map(partial(_write_span, part, descriptor, places, root, first), spans):
                files += written
                progress.show(len(files))
        finally:
            pool.shutdown(cancel_futures=True)
            os.close(descriptor)
    progress.end(len(files))
    return files


def _write_span(part: Samples, descriptor: int, places: _Places, root: Path, first: int, span: range) -> list[str]:
    files = []
    for sample in span:
        try:
            image = part.stored(descriptor, sample)
        except DamagedSample as damaged:
            raise UserError(
                f"sample {sample} of {part.path} is damaged ({damaged}), so nothing was kept: find all such with "
                f"--verify {part.path}"
            ) from damaged
        name = places.of(first + sample) + (".jpg" if image.mode == JPG else ".png")
        (root / name).write_bytes(_file_content(image))
        files.append(name)
    return files


def _file_content(image: EncodedImage) -> bytes:
    if image.mode == JPG:
        return image.payload.tobytes()
    pixels = image.payload.reshape(image.height, image.width, 3)
    done, png = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    assert done  # any 8-bit image can be a PNG
    return png.tobytes()


def _write_labels(dataset: Dataset, files: list[str], path: Path) -> None:
    """One line a sample: its file, every label, the class's name, and the name of the file that it was made of."""
    columns: dict[str, list] = {"file": files}
    for name in dataset.label_fields:
        columns[name] = read_labels(dataset, name).tolist()
    classes = class_names(dataset)
    if classes and "label" in columns and 0 <= min(columns["label"]) <= max(columns["label"]) < len(classes):
        columns["class"] = [classes[label] for label in columns["label"]]
    if all(os.path.exists(names_path(beton)) for beton in dataset.paths):
        columns["name"] = read_names(dataset)
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
