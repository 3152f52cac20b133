"""Small folders of images whose colours are their classes, with masks and depth maps, for tests of dense probes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200)], np.uint8)  # of class 0, 1, 2


def made_up(seed: int, size: tuple[int, int] = (32, 32), block: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image of coloured blocks uint8 [h, w, 3], the class of each pixel uint8 [h, w], depth = 1 + 2 x class."""
    draw = np.random.default_rng(seed)
    small = draw.integers(0, len(COLOURS), (size[0] // block, size[1] // block))
    mask = np.kron(small, np.ones((block, block), int)).astype(np.uint8)
    noise = draw.integers(0, 40, (*size, 3))
    return (COLOURS[mask] + noise).astype(np.uint8), mask, 1.0 + 2.0 * mask.astype(np.float32)


def write_png(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_dense_folder(folder: Path, *, train: int = 6, val: int = 4, size: tuple[int, int] = (32, 32)) -> Path:
    """The plain layout; depth as PNGs of thousandths in train, as .npy in val."""
    for split, count, first in (("train", train, 0), ("val", val, 1000)):
        for number in range(count):
            image, mask, depth = made_up(first + number, size)
            write_png(folder / "images" / split / f"{number}.png", image)
            write_png(folder / "masks" / split / f"{number}.png", mask)
            if split == "train":
                write_png(folder / "depth" / split / f"{number}.png", (1000 * depth).astype(np.uint16))
            else:
                (folder / "depth" / split).mkdir(parents=True, exist_ok=True)
                np.save(folder / "depth" / split / f"{number}.npy", depth)
    return folder
