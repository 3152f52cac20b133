"""Random and central crops and flips, compiled into the loading pipeline."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit

from ijepa_ds.random_streams import FLIP, stream, uniform


@dataclass(frozen=True)
class Crops:
    """Random crops: share of the image's area, width over height, and whether every other image is mirrored."""

    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool = False


@njit
def random_crop(height, width, key, scale, ratio):
    """Random resized crop as torchvision has it: top, left, rows, columns. ``scale`` is a share of the area."""
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(10):
        area = height * width * (scale[0] + uniform(key, 4 * attempt) * (scale[1] - scale[0]))
        aspect = math.exp(log_low + uniform(key, 4 * attempt + 1) * (log_high - log_low))
        columns = round(math.sqrt(area * aspect))
        rows = round(math.sqrt(area / aspect))
        if 0 < columns <= width and 0 < rows <= height:
            top = int(uniform(key, 4 * attempt + 2) * (height - rows + 1))
            left = int(uniform(key, 4 * attempt + 3) * (width - columns + 1))
            return top, left, rows, columns
    columns, rows = width, height
    if width / height < ratio[0]:
        rows = min(height, round(width / ratio[0]))
    elif width / height > ratio[1]:
        columns = min(width, round(height * ratio[1]))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


@njit
def center_crop(height, width, key, scale, ratio):
    """The largest centred crop of the output's shape, ``scale[0]`` of it a side; ``ratio[0]`` is width over height."""
    columns = min(float(width), height * ratio[0])
    rows = min(float(height), width / ratio[0])
    rows, columns = max(1, round(rows * scale[0])), max(1, round(columns * scale[0]))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


@njit
def is_flipped(seed, epoch, sample):
    """Whether a sample is mirrored in an epoch."""
    return uniform(stream(seed, FLIP, epoch, sample), 0) < 0.5


@njit
def _flips(seed, epoch, samples):
    flips = np.empty(len(samples), np.bool_)
    for position in range(len(samples)):
        flips[position] = is_flipped(seed, epoch, np.uint64(samples[position]))
    return flips


def flips_of(seed: int, epoch: int, samples: np.ndarray) -> np.ndarray:
    """Which of ``samples`` are mirrored in an epoch, bool of the same length."""
    return _flips(np.uint64(seed), np.uint64(epoch), samples)


@njit
def mirror(image):
    """Swap left and right in place, uint8 [H, W, 3]."""
    width = image.shape[1]
    for row in range(image.shape[0]):
        for column in range(width // 2):
            for colour in range(3):
                kept = image[row, column, colour]
                image[row, column, colour] = image[row, width - 1 - column, colour]
                image[row, width - 1 - column, colour] = kept
