"""What SOURCE can be: where the images of a conversion are, in which order, and what labels they have.

A :class:`Source` is small (names in one block of bytes, labels and offsets in arrays), so that ImageNet's 1.28 million
entries cost some 100 MB once and forked workers share them. Opening one lists and checks, it reads no image.
"""

from __future__ import annotations

import glob
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ijepa_ds.errors import UserError

NETPBM_SUFFIXES = {".ppm", ".pgm", ".pbm", ".pnm"}
JPEG_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".jp2"}
IMAGE_SUFFIXES = JPEG_SUFFIXES | NETPBM_SUFFIXES | {".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif"}
SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


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
            return file.read()

    def take(self, indices: np.ndarray) -> Source:
        """The samples ``indices`` only, in that order."""
        labels = {name: values[indices] for name, values in self.labels.items()}
        return replace(self, names=self.names.take(indices), labels=labels)

    def without_labels(self) -> Source:
        return replace(self, labels={}, class_names=[])


def open_source(path: str, *, split: str | None, devkit: str | None, labelled: bool) -> Source:
    """Find out what ``path`` is and list its images. Raises UserError where that cannot be told or nothing is there."""
    from imagenet import label_validation, open_imagenet_tar  # it builds on this file

    if not os.path.exists(path):
        raise UserError(f"SOURCE {path} does not exist: check the path")
    is_clevr = bool(clevr_splits(path)) and os.path.isdir(os.path.join(path, "images"))
    if split is not None and not is_clevr:
        raise UserError(
            f"--split is for CLEVR's layout (images/, scenes/CLEVR_*_scenes.json), which {path} has not: leave it out"
        )
    if is_clevr:
        source = open_clevr(path, split)
    elif os.path.isdir(path):
        source = open_folder(path, labelled=labelled and devkit is None)
    else:
        source = open_imagenet_tar(path, unlabelled_wanted=devkit is not None or not labelled)
    if not len(source):
        raise UserError(f"no images found in {path}{_seen_instead(source.ignored)}")
    if devkit is not None:
        if source.labels:
            raise UserError(f"--devkit labels ImageNet's validation images, but {path} is {source.kind}: leave it out")
        return label_validation(source, devkit)
    return source if labelled else source.without_labels()


def _seen_instead(ignored: Counter[str]) -> str:
    if not ignored:
        return ": it is empty"
    return (
        ", only "
        + ", ".join(f"{count} x {what}" for what, count in ignored.most_common(5))
        + ": give the images' folder"
    )


def open_folder(path: str, *, labelled: bool) -> Source:
    """Class folders (class k = the k-th sub-folder by name), or, where images lie directly in ``path``, no labels."""
    ignored: Counter[str] = Counter()
    if not labelled:
        return Source("images without labels", path, PackedNames(list(walk_images(path, ignored))), ignored=ignored)
    classes = [entry.name for entry in _entries(path) if not entry.name.startswith(".") and entry.is_dir()]
    direct = list(walk_images(path, ignored, nested=False))
    per_class = [
        [os.path.join(name, image) for image in walk_images(os.path.join(path, name), ignored)] for name in classes
    ]
    names = [name for images in per_class for name in images]
    if direct and names:
        raise UserError(
            f"{path} holds images both directly ({direct[0]}) and in sub-folders ({names[0]}), so it is not clear what "
            "the classes are: move the former away, or give --no-labels"
        )
    if direct:
        return Source("images without labels", path, PackedNames(direct), ignored=ignored)
    if names and SPLIT_NAMES.issuperset(name.lower() for name in classes):
        found = os.path.join(path, next(name for name, images in zip(classes, per_class, strict=True) if images))
        raise UserError(
            f"the sub-folders of {path} are splits, not classes: give one of them as SOURCE, such as {found}"
        )
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(images) for images in per_class])
    return Source("class folders", path, PackedNames(names), {"label": labels}, classes, ignored)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot list {folder} ({error.strerror}): mend its permissions") from error


def walk_images(
    folder: str,
    ignored: Counter[str],
    *,
    nested: bool = True,
    prefix: str = "",
    above: tuple[tuple[int, int], ...] = (),
) -> Iterator[str]:
    """Paths below ``folder`` of all files named like images, in order of name. The others are counted in ``ignored``.

    Links to folders are followed, but not into a folder that we are in (``above``: device and inode of each), which
    would never end.
    """
    own = os.stat(folder)
    above = (*above, (own.st_dev, own.st_ino))
    for entry in _entries(folder):
        if entry.name.startswith("."):
            ignored["hidden"] += 1
        elif entry.is_dir():
            inside = entry.stat()
            if not nested:
                continue
            if (inside.st_dev, inside.st_ino) in above:
                ignored["link to a folder above"] += 1
            else:
                yield from walk_images(entry.path, ignored, prefix=os.path.join(prefix, entry.name), above=above)
        elif is_image_name(entry.name):
            # Opening a named pipe would wait for ever. A broken link stays: it is reported as unreadable.
            if os.path.exists(entry.path) and not stat.S_ISREG(os.stat(entry.path).st_mode):
                ignored["not a file"] += 1
            else:
                yield os.path.join(prefix, entry.name)
        else:
            ignored[suffix_of(entry.name) or "no suffix"] += 1


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def is_image_name(name: str) -> bool:
    return suffix_of(name) in IMAGE_SUFFIXES


def clevr_splits(path: str) -> list[str]:
    """The splits that have a file of scenes, by name."""
    pattern = os.path.join(glob.escape(path), "scenes", "CLEVR_*_scenes.json")
    return sorted(os.path.basename(name)[len("CLEVR_") : -len("_scenes.json")] for name in glob.glob(pattern))


def open_clevr(path: str, split: str | None) -> Source:
    """CLEVR v1.0: ``count`` of objects and ``depth`` of the nearest one (its ``pixel_coords[2]``), as in VTAB."""
    splits = clevr_splits(path)
    if split not in splits:
        what = "give --split" if split is None else f"it has no scenes of the split '{split}': give --split"
        raise UserError(f"{path} has CLEVR's layout, {what} with one of: {', '.join(splits)}")
    scenes_path = os.path.join(path, "scenes", f"CLEVR_{split}_scenes.json")
    folder = os.path.join(path, "images", split)
    if not os.path.isdir(folder):
        raise UserError(
            f"the folder {folder} is missing, whose images {scenes_path} describes: unpack the whole data set"
        )
    scenes = read_scenes(scenes_path)
    present = {entry.name for entry in _entries(folder)}
    missing = [name for name, _ in scenes if name not in present]
    if missing:
        raise UserError(
            f"{scenes_path} names {len(missing)} of {len(scenes)} images that are not in {folder}, the first is "
            f"{missing[0]}: unpack the data set again"
        )
    described = {name for name, _ in scenes}
    ignored = Counter(
        "not in the scenes" if is_image_name(n) else suffix_of(n) or "no suffix" for n in present - described
    )
    labels = {
        "count": np.array([len(depths) for _, depths in scenes], dtype=np.int64),
        "depth": np.array([min(depths) for _, depths in scenes], dtype=np.float64),
    }
    return Source(
        f"CLEVR scenes, split {split}", folder, PackedNames([name for name, _ in scenes]), labels, [], ignored
    )


def read_scenes(path: str) -> list[tuple[str, list[float]]]:
    """(image file, depth of each of its objects) of each scene, sorted by file."""

    def thin(node: dict) -> object:
        # Called for the innermost objects first. Only what is needed survives, or CLEVR would take gigabytes.
        if "pixel_coords" in node:
            return float(node["pixel_coords"][2])
        if "image_filename" in node:
            return node["image_filename"], list(node["objects"])
        return node

    try:
        with open(path, encoding="utf-8") as file:
            scenes = sorted(json.load(file, object_hook=thin)["scenes"])
        for name, depths in scenes:
            if not depths:
                raise ValueError(f"the scene of {name} has no objects")
            if not all(isinstance(depth, float) for depth in depths):
                raise ValueError(f"an object of {name} has no pixel_coords")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"cannot read the scenes in {path} ({type(error).__name__}: {error}): it is not CLEVR's file, or damaged"
        ) from error
    return scenes
