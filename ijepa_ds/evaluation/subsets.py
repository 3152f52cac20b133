"""Few labels: which training images a few-shot subset takes.

A subset is either the usual list of file names (the 1 % of ImageNet of SimCLR, arXiv 2002.05709; the lists of MSN,
arXiv 2204.07141) or n images a class, drawn by a seed.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import torch

from ijepa_ds.data.beton import Dataset, read_names
from ijepa_ds.errors import UserError, some
from ijepa_ds.evaluation.labels import Classes
from ijepa_ds.evaluation.probes.standardise import rank_within_class
from ijepa_ds.evaluation.setting import Setting
from ijepa_ds.random_streams import SUBSET, permutation


def subsets(setting: Setting, field: str, classes: Classes) -> dict[str, list[np.ndarray]]:
    """Choose the images that --split-list or --per-class asks for.

    Returns:
        For each row of the results, called "13" (images a class) or "list", the positions among the training images in
        use, one array a draw.

    Raises:
        UserError: a listed file is not there, a class has too few images, or none.
    """
    options, data, labels = setting.options, setting.data, classes.train.numpy()
    if options.split_list is not None:
        train = data.datasets["train"]
        if len(data.samples["train"]) < train.num_samples:
            raise UserError("--split-list names the training images: leave out --train-images")
        listed = samples_of_list(options.split_list, train)
        cure = f"the 1 that each class needs: name more files in {options.split_list}"
        _check_enough(classes, labels[listed], 1, field, cure)
        return {"list": [listed]}
    numbers = sorted(set(options.per_class or (13,)))
    cure = f"--per-class {numbers[-1]}: ask for fewer, or raise --train-images"
    _check_enough(classes, labels, numbers[-1], field, cure)
    draw = functools.partial(draw_per_class, labels, seed=setting.seed)
    return {str(n): [draw(per_class=n, draw=number) for number in range(options.draws or 3)] for n in numbers}


def _check_enough(classes: Classes, labels: np.ndarray, number: int, field: str, cure: str) -> None:
    counts = np.bincount(labels, minlength=classes.num_classes)
    if (fewest := int(counts.min())) < number:
        name = classes.names[int(counts.argmin())]
        raise UserError(f"class {name} of '{field}' has {fewest} training images, fewer than {cure}")


def draw_per_class(labels: np.ndarray, *, per_class: int, seed: int, draw: int = 0) -> np.ndarray:
    """``per_class`` samples of each class among integer ``labels`` [n], int64, ascending.

    A pure function of seed, draw and sample: a draw with fewer images a class is part of one with more.
    """
    order = permutation(seed, draw, len(labels), purpose=SUBSET)
    rank = rank_within_class(torch.from_numpy(labels[order])).numpy()
    return np.sort(order[rank < per_class])


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
