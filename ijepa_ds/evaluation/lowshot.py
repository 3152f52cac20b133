"""Few labels: which images a few-shot subset takes, and logistic regression on them over several draws.

A subset is either the usual list of file names (the 1 % of ImageNet of SimCLR, arXiv 2002.05709; the lists of MSN,
arXiv 2204.07141) or n images a class, drawn by a seed.

Shapes: n rows (one an image), D features, C classes.
"""

from __future__ import annotations

import gzip
import os
import statistics
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_ds.errors import UserError
from ijepa_ds.evaluation import check_every_class, check_features, check_labels, check_splits
from ijepa_ds.evaluation.linear import LOGISTIC_L2, logistic_path
from ijepa_ds.random_streams import SUBSET, permutation

NUM_FOLDS = 5
# Where every class has one image, so that nothing can be held out to choose by. It hardly matters: on scikit-learn's
# digits (8 draws, pixels and random features) 1 to 1e-3 are within 0.3 points of each other.
FIXED_L2 = 1e-1


@dataclass(frozen=True)
class LowShot:
    """Accuracies in percent of the validation images, one a draw."""

    accuracies: list[float]
    l2: list[float]  # the strength that each draw chose
    predictions: Tensor  # [n of validation], int64, of the first draw
    images: list[int]  # how many labelled images each draw had

    @property
    def mean(self) -> float:
        """Over the draws."""
        return statistics.mean(self.accuracies)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation over the draws; None for a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


def samples_of_list(split_list: str | Path, beton: str | Path, *, num_samples: int) -> np.ndarray:
    """The samples of a .beton (which has ``num_samples``) whose files a split list names, int64, ascending.

    A line of the list is a file name such as ``n01440764_10043.JPEG``, or a path below the converted folder; empty
    lines do not count, nor does a repeated one. The names are those of FILE.beton.names.gz.

    Raises:
        UserError: a file is missing or unreadable, or the list names a file that the .beton lacks or has twice.
    """
    wanted = set(_read_lines(split_list))
    if not wanted:
        raise UserError(f"{split_list} names no files: give a list with one image file name per line")
    by_path = {line for line in wanted if "/" in line}
    found: dict[str, int] = {}
    for sample, name in enumerate(read_names(beton, num_samples=num_samples)):
        key = name if name in by_path else os.path.basename(name)
        if key not in wanted:
            continue
        if key in found:
            raise UserError(
                f"{split_list} names {key}, which several files of {beton} are called: "
                "list paths with their folder, such as " + name
            )
        found[key] = sample
    missing = sorted(wanted - found.keys())
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(wanted)} files in {split_list} are not in {beton}, the first is {missing[0]}: "
            "give the list of this data set, and convert it without --limit and --skip-unreadable"
        )
    return np.array(sorted(found.values()), np.int64)


def read_names(beton: str | Path, *, num_samples: int) -> list[str]:
    """The path below SOURCE of the file that each sample of a .beton came from, as data_prep/to_ffcv.py wrote it.

    Raises:
        UserError: the names file is missing, damaged, or another data set's.
    """
    path = Path(f"{beton}.names.gz")
    if not path.is_file():
        raise UserError(
            f"{path} is missing, so files cannot be found by name: copy it along with {beton}, or, where that was made "
            "before data_prep/to_ffcv.py wrote names, convert it again"
        )
    try:
        lines = gzip.decompress(path.read_bytes()).split(b"\n")[:-1]  # the last line ends in a line break too
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): convert {beton} again") from error
    if len(lines) != num_samples:
        raise UserError(f"{path} names {len(lines)} files for the {num_samples} samples of {beton}: convert it again")
    return [os.fsdecode(line) for line in lines]


def draw_per_class(labels: np.ndarray | Tensor, *, per_class: int, seed: int, draw: int = 0) -> np.ndarray:
    """``per_class`` samples of each class among integer ``labels`` [n], int64, ascending.

    A pure function of seed, draw and sample: a draw with fewer images a class is part of one with more.

    Raises:
        UserError: a class has too few images.
    """
    labels = np.asarray(labels)
    if per_class < 1:
        raise UserError(f"{per_class} images a class leave nothing to learn from: take at least 1")
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < per_class:
        few = counts.argmin()
        raise UserError(
            f"class {classes[few]} has {counts[few]} images, fewer than the {per_class} asked for: ask for fewer"
        )
    order = permutation(seed, draw, len(labels), purpose=SUBSET)
    by_class = order[np.argsort(labels[order], kind="stable")]
    rank = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)
    return np.sort(by_class[rank < per_class])


@torch.inference_mode(False)  # the fits need gradients wherever it is called from
def low_shot(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    *,
    subsets: Sequence[np.ndarray | Tensor],
    num_classes: int,
    strengths: Sequence[float] = LOGISTIC_L2,
) -> LowShot:
    """Logistic regression on each subset of train, measured on all of validation.

    The strength is chosen anew for each subset, by cross-entropy under 5-fold cross-validation within the subset:
    held out once, the 15 % of :func:`~ijepa_ds.evaluation.linear.linear_probe` would be 2 of 13 images a class, a
    choice by luck. With one image a class it is :data:`FIXED_L2`.

    Args:
        train_features: [n, D], any float dtype; the work is done on its device.
        train_labels: [n], integers from 0.
        val_features: [m, D].
        val_labels: [m].
        subsets: sample numbers into train, one array a draw.
        num_classes: C.
        strengths: values of l2 to choose from.

    Raises:
        UserError: rows that are not finite, lengths that do not match, a class without images in a subset.
    """
    if not subsets:
        raise UserError("there is no draw to measure: ask for at least 1")
    check_features("train", train_features, train_labels)
    check_features("val", val_features, val_labels)
    check_splits(train_features, val_features)
    device = train_features.device
    val_features, val_labels = val_features.detach().to(device).float(), val_labels.to(device)
    accuracies, chosen, predictions = [], [], []
    for subset in subsets:
        rows = torch.as_tensor(subset, device=device)
        features, labels = train_features[rows].detach().float(), train_labels.to(device)[rows]
        check_labels(labels, val_labels, num_classes=num_classes)
        check_every_class(labels, num_classes=num_classes)
        l2 = choose_strength(features, labels.long(), num_classes=num_classes, strengths=strengths)
        weight, bias = logistic_path(features, labels.long(), num_classes=num_classes, strengths=[l2])[l2]
        predictions.append(F.linear(val_features, weight, bias).argmax(dim=1))
        accuracies.append(100.0 * int((predictions[-1] == val_labels).sum()) / len(val_labels))
        chosen.append(l2)
    return LowShot(accuracies, chosen, predictions[0], [len(subset) for subset in subsets])


def choose_strength(features: Tensor, labels: Tensor, *, num_classes: int, strengths: Sequence[float]) -> float:
    """The l2 of least cross-entropy over all held-out images of the folds; :data:`FIXED_L2` where none can be."""
    if len(strengths) == 1:
        return strengths[0]
    fold = _deal_folds(labels)  # [n]
    if bool((fold < 0).all()):
        return FIXED_L2
    loss = dict.fromkeys(strengths, 0.0)
    for k in fold[fold >= 0].unique().tolist():
        held_out = fold == k
        fits = logistic_path(features[~held_out], labels[~held_out], num_classes=num_classes, strengths=strengths)
        for l2, (weight, bias) in fits.items():
            logits = F.linear(features[held_out], weight, bias)
            loss[l2] += float(F.cross_entropy(logits, labels[held_out], reduction="sum"))
    return min(strengths, key=lambda l2: loss[l2])


def _deal_folds(labels: Tensor) -> Tensor:
    """The fold of each of ``labels`` [n], dealt in turn within a class; -1 (never held out) for a class's only image.

    The samples of a subset ascend, and nothing in their order depends on the image: no seed is needed.
    """
    counts = torch.bincount(labels)
    by_class = labels.sort(stable=True).indices
    rank = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels[by_class]]
    fold = torch.empty_like(labels)
    fold[by_class] = torch.where(counts[labels[by_class]] > 1, rank % NUM_FOLDS, -1)
    return fold


def _read_lines(path: str | Path) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"cannot read the split list {path} ({error.strerror or error}): check the path") from error
    return [line.strip().removeprefix("./") for line in text.splitlines() if line.strip()]
