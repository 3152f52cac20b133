"""Few labels: which images a few-shot subset takes, and logistic regression on them over several draws.

A subset is either the usual list of file names (the 1 % of ImageNet of SimCLR, arXiv 2002.05709; the lists of MSN,
arXiv 2204.07141) or n images a class, drawn by a seed.

Shapes: n rows (one an image), D features, C classes.
"""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.probes.input_checks import check_every_class
from ijepa_ds.evaluation.setting import Setting, any_classes
from ijepa_ds.random_streams import SUBSET, permutation


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


def _read_lines(path: str | Path) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"cannot read the split list {path} ({error.strerror or error}): check the path") from error
    return [line.strip().removeprefix("./") for line in text.splitlines() if line.strip()]


@dataclass(frozen=True)
class Subset:
    """The labelled images of one row of the results, one array of positions among the images in use for each draw."""

    name: str  # "13" images a class, or "list"
    draws: list[np.ndarray]


def subsets(setting: Setting, field: str) -> list[Subset]:
    """What --split-list or --per-class asks for.

    Raises:
        UserError: a listed file is not there, a class has too few images, or none.
    """
    few, data = setting.few, setting.data
    classes = any_classes(setting, field)
    if few.split_list is not None:
        train = data.datasets["train"]
        if len(data.samples["train"]) < train.num_samples:
            raise UserError("--split-list names the training images: leave out --train-images")
        found = samples_of_list(few.split_list, train.path, num_samples=train.num_samples)
        check_every_class(classes.train[torch.from_numpy(found)], num_classes=classes.num_classes)
        return [Subset("list", [found])]
    counts = torch.bincount(classes.train, minlength=classes.num_classes)
    fewest, most = int(counts.argmin()), max(few.per_class)
    if counts[fewest] < most:
        raise UserError(
            f"class {classes.names[fewest]} of '{field}' has {int(counts[fewest])} training images, fewer than "
            f"--per-class {most}: ask for fewer, or raise --train-images"
        )
    return [
        Subset(
            str(per_class),
            [
                draw_per_class(classes.train, per_class=per_class, seed=setting.seed, draw=draw)
                for draw in range(few.draws)
            ],
        )
        for per_class in few.per_class
    ]
