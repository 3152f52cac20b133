"""Few labels: which training images a few-shot subset takes.

A subset is either the usual list of file names (the 1 % of ImageNet of SimCLR, arXiv 2002.05709; the lists of MSN,
arXiv 2204.07141) or n images a class, drawn by a seed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ijepa_ds.data.beton import Dataset, read_names
from ijepa_ds.errors import UserError, some
from ijepa_ds.evaluation.labels import Classes
from ijepa_ds.evaluation.setting import Setting, any_classes
from ijepa_ds.random_streams import SUBSET, permutation


@dataclass(frozen=True)
class Subset:
    """The labelled images of one row of the results, one array of positions among the images in use for each draw."""

    name: str  # "13" images a class, or "list"
    draws: list[np.ndarray]


def subsets(setting: Setting, field: str) -> list[Subset]:
    """Choose the images that --split-list or --per-class asks for.

    Raises:
        UserError: a listed file is not there, a class has too few images, or none.
    """
    options, data, classes = setting.options, setting.data, any_classes(setting, field)
    if options.split_list is not None:
        train = data.datasets["train"]
        if len(data.samples["train"]) < train.num_samples:
            raise UserError("--split-list names the training images: leave out --train-images")
        draws = [samples_of_list(options.split_list, train)]
        _check_enough(
            classes, draws[0], 1, field, f"the 1 that each class needs: name more files in {options.split_list}"
        )
        return [Subset("list", draws)]
    numbers = sorted(set(options.per_class or (13,)))
    everything = np.arange(len(classes.train))
    _check_enough(
        classes, everything, numbers[-1], field, f"--per-class {numbers[-1]}: ask for fewer, or raise --train-images"
    )
    return [
        Subset(
            str(number),
            [
                draw_per_class(classes.train.numpy(), per_class=number, seed=setting.seed, draw=draw)
                for draw in range(options.draws or 3)
            ],
        )
        for number in numbers
    ]


def _check_enough(classes: Classes, positions: np.ndarray, number: int, field: str, cure: str) -> None:
    counts = torch.bincount(classes.train[torch.from_numpy(positions)], minlength=classes.num_classes)
    fewest = int(counts.argmin())
    if counts[fewest] < number:
        raise UserError(
            f"class {classes.names[fewest]} of '{field}' has {int(counts[fewest])} training images, fewer than {cure}"
        )


def draw_per_class(labels: np.ndarray, *, per_class: int, seed: int, draw: int = 0) -> np.ndarray:
    """``per_class`` samples of each class among integer ``labels`` [n], int64, ascending.

    A pure function of seed, draw and sample: a draw with fewer images a class is part of one with more.
    """
    order = permutation(seed, draw, len(labels), purpose=SUBSET)
    by_class = order[np.argsort(labels[order], kind="stable")]
    _, counts = np.unique(labels, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)
    return np.sort(by_class[rank < per_class])


def samples_of_list(split_list: str | Path, dataset: Dataset) -> np.ndarray:
    """The samples of a .beton whose files a split list names, int64, ascending.

    A line of the list is a file name such as ``n01440764_10043.JPEG``, or a path below the converted folder; empty
    lines do not count, nor does a repeated one. The names are those of FILE.beton.names.gz.

    Raises:
        UserError: a file is missing or unreadable, or the list names a file that the .beton lacks or has twice.
    """
    try:
        text = Path(split_list).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"cannot read the split list {split_list} ({error.strerror}): check the path") from error
    wanted = {line.strip().removeprefix("./") for line in text.splitlines()} - {""}
    if not wanted:
        raise UserError(f"{split_list} names no files: give a list with one image file name per line")
    samples: dict[str, int] = {}
    for sample, path in enumerate(read_names(dataset)):
        name = path if path in wanted else os.path.basename(path)
        if name in samples:
            raise UserError(
                f"{split_list} names {name}, which several files of {dataset.path} are called: list paths with their "
                f"folder, such as {path}"
            )
        if name in wanted:
            samples[name] = sample
    if missing := sorted(wanted - samples.keys()):
        raise UserError(
            f"{len(missing)} of the {len(wanted)} files in {split_list} are not in {dataset.path}: {some(missing)}; "
            "give the list of this data set, and convert it without --limit and --skip-unreadable"
        )
    return np.array(sorted(samples.values()), np.int64)
