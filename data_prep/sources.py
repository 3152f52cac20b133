"""What SOURCE can be: where the images of a conversion are, in which order, and what labels they have.

A :class:`Source` is small (names in one block of bytes, labels and offsets in arrays), so that ImageNet's 1.28 million
entries cost some 100 MB once and forked workers share them. Opening one lists and checks, it reads no image.
"""

from __future__ import annotations

import os
from collections import Counter

from data_prep.clevr import clevr_splits, open_clevr
from data_prep.folders import open_folder
from data_prep.imagenet import label_validation, open_imagenet_tar
from data_prep.source import Source
from ijepa_ds.errors import UserError


def open_source(path: str, *, split: str | None, devkit: str | None, labelled: bool) -> Source:
    """Find out what ``path`` is and list its images. Raises UserError where that cannot be told or nothing is there."""
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
    kinds = ", ".join(f"{count} x {what}" for what, count in ignored.most_common(5))
    return f", only {kinds}: give the images' folder" if ignored else ": it is empty"
