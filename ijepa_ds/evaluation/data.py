"""The labelled images of an evaluation: two .beton files, and which of their samples are used.

Shapes: n training, m validation images; B of a batch, H x W pixels.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ijepa_ds.config import Config
from ijepa_ds.data.beton import (
    Dataset,
    class_names,
    image_sizes,
    inspect_dataset,
    integer_label_fields,
    read_labels,
)
from ijepa_ds.data.file_set import read_note
from ijepa_ds.data.image_loader import ImageLoader
from ijepa_ds.distributed import Process
from ijepa_ds.errors import UserError, some
from ijepa_ds.evaluation.features import spread_samples

SPLITS = ("train", "validation")
CROP_SHARE = 0.875  # resize 256, centre crop 224


class LabelledData:
    """The images to fit on, called train, and those to measure on, called validation, as the options name them.

    Raises:
        UserError: a file is missing or not one, they share no label field, or their classes are not the same.
    """

    def __init__(self, options: argparse.Namespace, config: Config, process: Process) -> None:
        data = config.ijepa.data
        self.image_size, self.process = data.image_size, process
        self._loading: dict[str, Any] = {"batch_size": options.micro_batch, "num_workers": data.workers}
        self._loaders: dict[tuple, ImageLoader] = {}
        train, validation = options.train or data.train, options.validation or data.validation
        if validation is None:
            raise UserError(
                "there is nothing to measure on: give --validation FILE.beton, or set ijepa.data.validation"
            )
        for path in (train, validation):
            if isinstance(path, str) and Path(path).is_dir():
                raise UserError(
                    f"{path} is a folder; convert its class folders once: python data_prep/to_ffcv.py {path} "
                    f"{path.rstrip('/')}.beton"
                )
        self.datasets = dict(zip(SPLITS, map(inspect_dataset, (train, validation)), strict=True))
        self.paths = tuple(dataset.path for dataset in self.datasets.values())  # as sentences call them
        self.samples = {
            "train": spread_samples(self.datasets["train"].num_samples, options.train_images),
            "validation": spread_samples(self.datasets["validation"].num_samples, options.validation_images),
        }
        others = self.datasets["validation"].label_fields
        self.fields = [name for name in self.datasets["train"].label_fields if name in others]
        self.integer_fields = [name for name in integer_label_fields(self.datasets["train"]) if name in others]
        if not self.fields:
            raise UserError(
                f"{' and '.join(self.paths)} share no label field; convert labelled images with data_prep/to_ffcv.py"
            )
        self.class_names = _class_names(*self.datasets.values())

    def labels(self, field: str) -> tuple[Tensor, Tensor]:
        """The raw labels of train [n] and validation [m].

        Raises:
            UserError: there is no such field, or one of its values is no number.
        """
        if field not in self.fields:
            raise UserError(
                f"{self.paths[0]} and {self.paths[1]} have no label field '{field}' in common (they have: "
                f"{', '.join(self.fields)}); choose one of these with --label"
            )
        train, validation = (
            torch.from_numpy(read_labels(self.datasets[split], field)[self.samples[split]]) for split in SPLITS
        )
        for path, values in zip(self.paths, (train, validation), strict=True):
            if num_bad := int((~torch.isfinite(values)).sum()):
                raise UserError(f"'{field}' is no number for {num_bad} of {len(values)} images of {path}: convert anew")
        return train, validation

    def crop_share(self) -> float:
        """The central crop's side over the shorter side of an image: 0.875.

        1 where images are no larger than the encoder's input, of which a smaller part would only be blown up.
        """
        heights, widths = image_sizes(self.datasets["validation"])
        return CROP_SHARE if np.median(np.minimum(heights, widths)) > max(self.image_size) else 1.0

    def is_clevr(self) -> bool:
        """Whether these are CLEVR's own images, which are 480 x 320, and not the built-in scenes, which are square."""
        heights, widths = image_sizes(self.datasets["train"])
        wide = bool(np.all(np.abs(widths / heights - 1.5) < 0.02))
        notes = [read_note(path) for dataset in self.datasets.values() for path in dataset.paths]
        return wide and all(str(note.get("kind", "")).startswith("CLEVR") for note in notes)

    def loader(self, split: str, **options: Any) -> ImageLoader:
        """Make an :class:`ImageLoader` with these options, once: compiling one takes seconds."""
        key = (split, *options.items())
        if key not in self._loaders:
            loading = {"image_size": self.image_size, **self._loading, **options}
            self._loaders[key] = ImageLoader(self.datasets[split], **loading)
        return self._loaders[key]


def _class_names(*datasets: Dataset) -> list[str]:
    """The names of the classes of ``label``, where both sets have them; class k is the k-th."""
    train, validation = map(class_names, datasets)
    if train and validation and train != validation:
        paths = [dataset.path for dataset in datasets]
        only = [sorted(set(ours) - set(theirs)) for ours, theirs in ((train, validation), (validation, train))]
        reasons = [f"only {path} has {some(names)}" for path, names in zip(paths, only, strict=True) if names]
        raise UserError(
            f"the classes of {paths[0]} and {paths[1]} are not the same: "
            f"{', '.join(reasons) or 'their order differs'}; convert folders with the same sub-folders"
        )
    return train or validation
