"""What dense probes learn and how they are scored: classes and depths of patches, mean IoU over pixels.

Shapes: H x W pixels of p x p patches, N patches on a grid, h x w pixels of a mask, C classes.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_ds.random_streams import SUBSET, permutation

HELD_OUT_SHARE = 0.15  # of the images, to choose a probe's strength by


def nearest_pixels(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``values`` [h, w] at the pixel nearest to each of ``size`` (rows, columns): classes must not be mixed."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64) for new, old in zip(size, values.shape, strict=True)
    )
    return values[rows[:, None], columns]


def by_patch(values: np.ndarray, patch: int) -> np.ndarray:
    """Pixels [H, W] -> [N, p * p], patches row by row."""
    rows, columns = (side // patch for side in values.shape)
    return values.reshape(rows, patch, columns, patch).transpose(0, 2, 1, 3).reshape(rows * columns, patch * patch)


def majority(classes: np.ndarray, patch: int, *, ignored: int) -> np.ndarray:
    """The most frequent class of each patch, of equal ones the lowest: uint8 [N] from uint8 [H, W].

    Pixels that are ``ignored`` have no vote; a patch of such pixels alone is ignored.
    """
    pixels = by_patch(classes, patch).astype(np.int64)
    places = np.arange(len(pixels))[:, None] * 256 + pixels
    counts = np.bincount(places.reshape(-1), minlength=len(pixels) * 256).reshape(-1, 256)
    counts[:, ignored] = 0
    return np.where(counts.any(axis=1), counts.argmax(axis=1), ignored).astype(np.uint8)


def patch_means(values: np.ndarray, patch: int) -> np.ndarray:
    """The mean of each patch's pixels that are numbers, NaN where none is: float32 [N] from [H, W]."""
    pixels = by_patch(values.astype(np.float64), patch)
    known = np.isfinite(pixels)
    sums, counts = np.where(known, pixels, 0.0).sum(axis=1), known.sum(axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).astype(np.float32)


def upsampled_classes(scores: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The class of highest score at every pixel, int64 [h, w]: scores [N, C] are enlarged bilinearly to ``size``."""
    # As F.interpolate(mode="bilinear", align_corners=False), which takes several times as long on CPUs.
    rows, columns = (_interpolation(*sides, scores.device) for sides in zip(grid, size, strict=True))
    return (rows @ (scores.T.reshape(-1, *grid) @ columns.T)).argmax(dim=0)


@functools.lru_cache(maxsize=512)  # pictures of a set have few sizes, or each its own
def _interpolation(old: int, new: int, device: torch.device) -> Tensor:
    """The share of each of ``old`` values in each of ``new`` ones along a line: [new, old]."""
    identity = torch.eye(old, device=device)[None]
    return F.interpolate(identity, size=new, mode="linear", align_corners=False)[0].T


def confusion(truth: Tensor, predicted: Tensor, num_classes: int, *, ignored: int) -> Tensor:
    """Pixels of each true class (rows) by the predicted one, int64 [C, C]; those that are ``ignored`` do not count."""
    known = truth != ignored
    pairs = truth[known].long() * num_classes + predicted[known]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def intersection_over_union(counts: Tensor) -> Tensor:
    """Percent of each class from a confusion [C, C], float64 [C]; NaN of a class that no pixel truly has."""
    counts = counts.double()
    hits, true, predicted = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
    return torch.where(true > 0, 100.0 * hits / (true + predicted - hits), math.nan)


def mean_iou(counts: Tensor) -> float:
    """Percent, the mean over classes that have true pixels: so every candidate's mean is over the same classes."""
    return float(intersection_over_union(counts).nanmean())


def pixel_accuracy(counts: Tensor) -> float:
    """Percent of labelled pixels."""
    return 100.0 * int(counts.diagonal().sum()) / max(1, int(counts.sum()))


def held_out_images(images: np.ndarray, labels: np.ndarray, *, seed: int) -> np.ndarray:
    """Hold out about 15 % of the images, whole: bool [P] of patches, whose image and class are ``images``, ``labels``.

    Patches of one image are alike, so a part of them would not tell which strength does well on others. Those of a
    class that no other image has are not held out.
    """
    distinct = np.unique(images)
    number = min(len(distinct) - 1, max(1, round(HELD_OUT_SHARE * len(distinct))))
    chosen = distinct[permutation(seed, 0, len(distinct), purpose=SUBSET)[:number]]
    held_out = np.isin(images, chosen)
    kept = np.bincount(labels[~held_out], minlength=int(labels.max()) + 1)
    return held_out & (kept[labels] > 0)
