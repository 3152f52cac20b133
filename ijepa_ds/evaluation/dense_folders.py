"""Folders of images with a class or a depth for every pixel: which files belong together, and how each is read.

Three layouts: ADE20K's, VOC's, and the plain one, which the built-in scenes have. Shapes: h x w pixels of a file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from ijepa_ds.errors import UserError, some

IGNORED = 255  # a pixel without a class
MOST_CLASSES = 255
PNG_DEPTH_UNITS = 1000.0  # a PNG holds thousandths: millimetres, as NYU and RealSense write them
IMAGE_KINDS = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
VOC_CLASSES = [
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip
ADE20K_CLASSES = [str(index) for index in range(1, 151)]  # as its files number them; 0 has no label
LAYOUTS = (
    "images/{train,val} with masks/{train,val} or depth/{train,val}, ADE20K's images/ and annotations/{training,"
    "validation}, or VOC's JPEGImages, SegmentationClass and ImageSets/Segmentation"
)
Read = TypeVar("Read")


@dataclass(frozen=True)
class Sample:
    """The files of one image; a folder has masks, depth maps or both."""

    image: Path
    mask: Path | None
    depth: Path | None


@dataclass(frozen=True)
class DenseFolder:
    """The samples of both splits, and the classes' names where the layout tells them."""

    layout: str  # "plain", "ADE20K" or "VOC"
    samples: dict[str, list[Sample]]  # of "train" and "validation"
    names: list[str] | None = None

    def read_mask(self, path: Path) -> np.ndarray:
        """The class of each pixel, uint8 [h, w], or :data:`IGNORED`.

        Raises:
            UserError: it cannot be read, is no picture of indices, or has one that is no class.
        """
        indices = read_indices(path)
        unlabelled, known = 255, MOST_CLASSES if self.names is None else len(self.names)
        if self.layout == "ADE20K":
            unlabelled, indices = -1, indices - 1
        labelled = indices[indices != unlabelled]
        if len(labelled) and (highest := int(labelled.max())) >= known:
            offset = int(self.layout == "ADE20K")
            raise UserError(
                f"{path} has the class index {highest + offset}, but there are {known} classes, {offset} to "
                f"{known - 1 + offset}: mend the mask" + (", or classes.txt" if self.layout == "plain" else "")
            )
        return np.where(indices == unlabelled, IGNORED, indices).astype(np.uint8)


def open_folder(path: Path) -> DenseFolder:
    """Find the samples of both splits.

    Raises:
        UserError: no such folder or layout, no images, or an image without its mask or depth map.
    """
    if not path.is_dir():
        raise UserError(f"--dense-data {path} is no folder: give one with {LAYOUTS}")
    if (path / "SegmentationClass").is_dir():
        return DenseFolder("VOC", {"train": _of_voc(path, "train"), "validation": _of_voc(path, "val")}, VOC_CLASSES)
    if (path / "annotations").is_dir():
        splits = {"train": "training", "validation": "validation"}
        samples = {split: _paired(path, name, ("annotations", None)) for split, name in splits.items()}
        return DenseFolder("ADE20K", samples, ADE20K_CLASSES)
    if not (path / "images").is_dir() or not any((path / kind).is_dir() for kind in ("masks", "depth")):
        raise UserError(f"--dense-data {path} has none of the known layouts: {LAYOUTS}")
    kinds = tuple(kind if (path / kind).is_dir() else None for kind in ("masks", "depth"))
    samples = {split: _paired(path, name, kinds) for split, name in (("train", "train"), ("validation", "val"))}
    return DenseFolder("plain", samples, _named_classes(path / "classes.txt"))


def _paired(path: Path, split: str, kinds: tuple[str | None, ...]) -> list[Sample]:
    """The images of one split with the files of the same stem in the folders of masks and depth maps."""
    folder = path / "images" / split
    images = sorted(file for file in folder.glob("*") if file.suffix.lower() in IMAGE_KINDS)
    if not images:
        raise UserError(f"{folder} has no images: a dense folder has {LAYOUTS}")
    found: list[dict[str, Path]] = []
    for kind in kinds:
        files = [*(path / kind / split).glob("*.png"), *(path / kind / split).glob("*.npy")] if kind else []
        found.append({file.stem: file for file in files if file.suffix == ".png" or kind == "depth"})
        if kind and (alone := [image.name for image in images if image.stem not in found[-1]]):
            raise UserError(
                f"{len(alone)} of the {len(images)} images in {folder} have no file of their name in "
                f"{path / kind / split}: {some(alone)}; add theirs, or take these images out"
            )
    masks, depths = found if len(found) == 2 else (found[0], {})
    return [Sample(image, masks.get(image.stem), depths.get(image.stem)) for image in images]


def _of_voc(path: Path, split: str) -> list[Sample]:
    listing = path / "ImageSets" / "Segmentation" / f"{split}.txt"
    try:
        stems = listing.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise UserError(f"{listing} cannot be read ({error}): VOC's layout has it; unpack the data set anew") from error
    if not stems:
        raise UserError(f"{listing} names no images: unpack the data set anew")
    samples = [
        Sample(path / "JPEGImages" / f"{stem}.jpg", path / "SegmentationClass" / f"{stem}.png", None) for stem in stems
    ]
    files = [file for sample in samples for file in (sample.image, sample.mask) if file and not file.is_file()]
    if files:
        raise UserError(f"{listing} names images of which {some(files, 3)} are missing: unpack the data set anew")
    return samples


def _named_classes(path: Path) -> list[str] | None:
    if not path.is_file():
        return None
    names = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if not 2 <= len(names) <= MOST_CLASSES:
        raise UserError(f"{path} names {len(names)} classes: give one name a line, of 2 to {MOST_CLASSES} classes")
    return names


def _reading(path: Path, read: Callable[[], Read]) -> Read:
    """What ``read`` gives; whatever the libraries say of a damaged file becomes one sentence."""
    try:
        return read()
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): it is damaged or of another format; mend or remove it"
        ) from error


def size_of(path: Path) -> tuple[int, int]:
    """Rows and columns of an image, from its header."""

    def read() -> tuple[int, int]:
        with Image.open(path) as image:
            return image.height, image.width

    return _reading(path, read)


def read_image(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """The image in RGB, uint8 [h, w, 3]; resized to ``size`` (rows, columns) whole, whatever its sides' ratio."""

    def read() -> np.ndarray:
        with Image.open(path) as image:
            colours = image.convert("RGB")
        if size is not None and colours.size != (size[1], size[0]):
            colours = colours.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        return np.array(colours)

    return _reading(path, read)


def read_indices(path: Path) -> np.ndarray:
    """The numbers in a PNG of one channel or with a palette, int32 [h, w]."""

    def read() -> np.ndarray:
        with Image.open(path) as image:
            return np.array(image)

    values = _reading(path, read)
    if values.ndim != 2:
        raise UserError(f"{path} is a picture in colours: a mask is a PNG of one channel or with a palette, of indices")
    return values.astype(np.int32)


def read_depth(path: Path) -> np.ndarray:
    """The depth of each pixel, float32 [h, w], NaN where a file has none: 0 or less, NaN, infinity.

    A PNG holds thousandths, a .npy the numbers themselves.
    """
    if path.suffix == ".npy":
        values = _reading(path, lambda: np.load(path, allow_pickle=False))
        if values.ndim != 2 or values.dtype.kind not in "fiu":
            raise UserError(f"{path} holds {values.dtype} {list(values.shape)}: a depth map is numbers [rows, columns]")
        depth = values.astype(np.float32)
    else:
        depth = read_indices(path).astype(np.float32) / np.float32(PNG_DEPTH_UNITS)
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(np.nan))
