"""What ``--task dense`` measures: the images of a folder, and the class and depth of each patch of theirs.

Images are resized whole to the encoder's input, masks and depth maps to the same size by the nearest pixel; a patch has
the most frequent class and the mean depth of its pixels. All files are read here, before the first encoder computes.

Shapes: n images of a split, N patches, p pixels of a patch's side, H x W pixels of the input, C classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ijepa_ds.config import Config
from ijepa_ds.data.ffcv_pipeline import DecodeError
from ijepa_ds.errors import UserError, some
from ijepa_ds.evaluation.dense_folders import (
    IGNORED,
    DenseFolder,
    Sample,
    open_folder,
    read_depth,
    read_image,
    size_of,
)
from ijepa_ds.evaluation.features import spread_samples
from ijepa_ds.evaluation.probes.patch_scores import majority, nearest_pixels, patch_means
from ijepa_ds.progress import Progress

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Patches:
    """What is known of the patches of one split; of a folder without masks or depth maps that part is None."""

    classes: np.ndarray | None  # uint8 [n, N], IGNORED where no pixel has one
    depth: np.ndarray | None  # float32 [n, N], NaN where no pixel has one
    pixels: np.ndarray  # of each class in the whole masks, int64 [256]


@dataclass(frozen=True)
class Example:
    """One image to be shown with its truth and what each probe said, by the probe's name."""

    image: np.ndarray  # uint8 [h, w, 3]
    truth: np.ndarray  # uint8 [h, w] or float32 [h, w]
    predictions: dict[str, np.ndarray]  # [h, w], or of depth [rows, columns] of patches


class DenseData:
    """The images in use of both splits, and what is known of their patches.

    Raises:
        UserError: whatever is wrong with the folder or one of its files.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        config: Config,
        progress: Callable[[str, int], Progress] = lambda name, total: Progress(total, enabled=False),
    ) -> None:
        self.path, self.grid, self.size = Path(options.dense_data), config.grid, config.ijepa.data.image_size
        self.patch, self.batch, self.workers = (
            config.ijepa.model.patch_size,
            options.micro_batch,
            config.ijepa.data.workers,
        )
        self.folder: DenseFolder = open_folder(self.path)
        limits = {"train": options.train_images, "validation": options.validation_images}
        self.samples: dict[str, list[Sample]] = {
            split: [samples[k] for k in spread_samples(len(samples), limits[split])]
            for split, samples in self.folder.samples.items()
        }
        self.patches = {split: self._read(split, progress) for split in self.samples}
        self.names = self._names()
        self._check()

    def _names(self) -> list[str]:
        """The names of all classes; in a plain folder without names as many as the training masks show."""
        if self.folder.names is not None:
            return self.folder.names
        shown = [np.flatnonzero(patches.pixels[:IGNORED]) for patches in self.patches.values()]
        if self.patches["train"].classes is None or not len(shown[0]):
            return []
        if unknown := sorted(set(shown[1].tolist()) - set(range(int(shown[0][-1]) + 1))):
            raise UserError(
                f"the validation masks of {self.path} have the class index {unknown[-1]}, but there are "
                f"{shown[0][-1] + 1} classes by the training masks in use: mend the masks, raise --train-images, or "
                f"name all classes in {self.path / 'classes.txt'}, one a line"
            )
        return [str(index) for index in range(int(shown[0][-1]) + 1)]

    def _check(self) -> None:
        train, validation = self.patches["train"], self.patches["validation"]
        if train.classes is not None and len(np.unique(train.classes[train.classes != IGNORED])) < 2:
            raise UserError(
                f"all labelled patches of {self.path}'s training images are of one class, or there are none"
            )
        if train.classes is not None and not validation.pixels[:IGNORED].any():
            raise UserError(f"no pixel of {self.path}'s validation masks has a class: there is nothing to measure on")
        if validation.depth is not None and not np.isfinite(validation.depth).any():
            raise UserError(f"no pixel of {self.path}'s validation depth maps has a depth above 0")
        if not self.known("train").any():
            raise UserError(f"no patch of {self.path}'s training images has both a class and a depth")

    def known(self, split: str) -> np.ndarray:
        """The patches of which everything is known that this folder tells, bool [n, N]."""
        classes, depth = self.patches[split].classes, self.patches[split].depth
        known = np.ones((len(self.samples[split]), self.grid[0] * self.grid[1]), bool)
        if classes is not None:
            known &= classes != IGNORED
        return known if depth is None else known & np.isfinite(depth)

    def missing_classes(self) -> list[str]:
        """Names of classes that validation has and no training patch: nothing can know them."""
        train, pixels = self.patches["train"].classes, self.patches["validation"].pixels
        learnt = set() if train is None else set(np.unique(train).tolist())
        return [name for index, name in enumerate(self.names) if pixels[index] and index not in learnt]

    def describe(self) -> str:
        """One line."""
        train, validation = map(len, self.samples.values())
        what = [f"{len(self.names)} classes"] * bool(self.names)
        what += ["depth"] * (self.patches["train"].depth is not None)
        return f"dense: {train:,} and {validation:,} images of {self.path} ({self.folder.layout}), {' and '.join(what)}"

    def _read(self, split: str, progress: Callable[[str, int], Progress]) -> Patches:
        """Read and check the masks and depth maps of one split."""
        samples = self.samples[split]
        shown, read = progress(f"masks of {split}", len(samples)), []
        for row in self._mapped(self._of_sample, samples):
            read.append(row)
            shown.show(len(read))
        shown.end(len(samples))
        classes, depth, pixels = zip(*read, strict=True)
        return Patches(
            None if samples[0].mask is None else np.stack(classes),
            None if samples[0].depth is None else np.stack(depth),
            np.sum(pixels, axis=0),
        )

    def _of_sample(self, sample: Sample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The patches' classes uint8 [N] and depths [N], and the pixels of each class [256]."""
        size, classes, depth, pixels = size_of(sample.image), np.empty(0), np.empty(0), np.zeros(256, np.int64)
        if sample.mask is not None:
            mask = self.folder.read_mask(sample.mask)
            _check_size(sample.image, size, sample.mask, mask.shape)
            pixels = np.bincount(mask.reshape(-1), minlength=256)
            classes = majority(nearest_pixels(mask, self.size), self.patch, ignored=IGNORED)
        if sample.depth is not None:
            values = read_depth(sample.depth)
            _check_size(sample.image, size, sample.depth, values.shape)
            depth = patch_means(nearest_pixels(values, self.size), self.patch)
        return classes, depth, pixels

    def _mapped(self, function: Callable[[Item], Made], items: Sequence[Item]) -> Iterator[Made]:
        """``function`` of each item in order, on several threads; no more than a batch is held."""
        with ThreadPoolExecutor(self.workers) as pool:
            for start in range(0, len(items), self.batch):
                yield from pool.map(function, items[start : start + self.batch])

    def loader(self, split: str) -> FolderImages:
        """The images of one split at the encoder's size."""
        return FolderImages(self, split)

    def masks(self, split: str, positions: Iterable[int]) -> list[Tensor]:
        """The masks of images in their own size, uint8 [h, w] each."""
        paths = [path for k in positions if (path := self.samples[split][k].mask) is not None]
        return [torch.from_numpy(mask) for mask in self._mapped(self.folder.read_mask, paths)]


class FolderImages:
    """Batches of a folder's images, as :class:`ijepa_ds.data.image_loader.ImageLoader` gives those of a .beton."""

    def __init__(self, data: DenseData, split: str) -> None:
        self._data, self._samples = data, data.samples[split]

    def batches(self, positions: np.ndarray) -> Iterator[Tensor]:
        """The images at ``positions`` in their order, uint8 [B, H, W, 3].

        Raises:
            DecodeError: one cannot be decoded, though its header could be read.
        """
        with ThreadPoolExecutor(self._data.workers) as pool:
            for start in range(0, len(positions), self._data.batch):
                images = list(pool.map(self._read, positions[start : start + self._data.batch]))
                yield torch.from_numpy(np.stack(images))

    def _read(self, position: int) -> np.ndarray:
        try:
            return read_image(self._samples[position].image, self._data.size)
        except UserError as error:
            raise DecodeError(str(error)) from error


def _check_size(image: Path, size: tuple[int, int], other: Path, other_size: tuple[int, ...]) -> None:
    if size != other_size:
        sizes = " and ".join(" x ".join(map(str, pixels)) for pixels in (size, other_size))
        raise UserError(
            f"{image} and {other} differ in size ({sizes} rows and columns): both must show the same pixels"
        )


def say_missing(data: DenseData, say: Callable[[str], None]) -> None:
    """Say which classes nothing can know, if any."""
    if missing := data.missing_classes():
        say(f"{len(missing)} classes are in no training patch and count as 0 % each: {some(missing)}")
