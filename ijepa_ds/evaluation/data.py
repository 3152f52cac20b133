"""The labelled images of an evaluation: two .beton files, which of their samples are used, and features of them.

Shapes: n images, F features.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ijepa_ds.data.beton import image_sizes, inspect_dataset, integer_label_fields, read_labels
from ijepa_ds.data.image_loader import ImageLoader
from ijepa_ds.distributed import Process
from ijepa_ds.errors import UserError, some
from ijepa_ds.evaluation.candidates import Candidate
from ijepa_ds.evaluation.features import extract_features, spread_samples
from ijepa_ds.progress import Progress

SPLITS = ("train", "validation")
CROP_SHARE = 0.875  # resize 256, centre crop 224


class LabelledData:
    """Train and validation: labels, and features of whichever candidate is measured.

    Args:
        paths: the two .beton files.
        limits: use at most so many images of each, evenly spread.
        image_size: (rows, columns) in pixels that the encoder takes.
        micro_batch: images of one forward pass.
        num_workers: decoding threads of this process.
        process: this one among all, which share the work.

    Raises:
        UserError: a file is not one, they share no label field, or their classes are not the same.
    """

    def __init__(
        self,
        paths: tuple[str, str],
        *,
        limits: tuple[int | None, int | None],
        image_size: tuple[int, int],
        micro_batch: int,
        num_workers: int,
        process: Process,
    ) -> None:
        self.paths, self.image_size, self.process = paths, image_size, process
        for path in paths:
            if Path(path).is_dir():
                raise UserError(
                    f"{path} is a folder; convert its class folders once: python data_prep/to_ffcv.py {path} "
                    f"{str(path).rstrip('/')}.beton"
                )
        self.datasets = dict(zip(SPLITS, map(inspect_dataset, paths), strict=True))
        train, validation = self.datasets.values()
        sizes = train.num_samples, validation.num_samples
        self.samples = dict(zip(SPLITS, map(spread_samples, sizes, limits), strict=True))
        self.fields = tuple(name for name in train.label_fields if name in validation.label_fields)
        if not self.fields:
            raise UserError(
                f"{paths[0]} and {paths[1]} share no label field; convert labelled images with data_prep/to_ffcv.py"
            )
        self.integer_fields = tuple(name for name in integer_label_fields(train) if name in self.fields)
        self.class_names = _class_names(paths)
        self._loading: dict[str, Any] = {"batch_size": micro_batch, "num_workers": num_workers}
        self._loaders: dict[tuple, ImageLoader] = {}
        self._features: dict[tuple, Tensor] = {}
        self._owner: Candidate | None = None
        self._images, self._seconds = 0, 0.0

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

    def features(
        self,
        candidate: Candidate,
        split: str,
        *,
        crop_share: float,
        mirrored: bool = False,
        positions: np.ndarray | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Features fp32 [n, F] of the central crops, on the CPU, or of those at ``positions`` among the images in use.

        Those of all images are kept until another candidate is asked about.
        """
        if self._owner is not candidate:
            self._owner, self._features, self._images, self._seconds = candidate, {}, 0, 0.0
        key = (split, crop_share, mirrored)
        if key in self._features:
            kept = self._features[key]
            return kept if positions is None else kept[torch.from_numpy(positions)]
        samples = self.samples[split] if positions is None else self.samples[split][positions]
        loader, began = self.loader(split, crop_share=crop_share), time.monotonic()

        def forward(images: Tensor) -> Tensor:
            return candidate.forward(images.flip(2) if mirrored else images)

        rows = extract_features(forward, loader, samples, self.process, progress=progress)
        self._images, self._seconds = self._images + len(samples), self._seconds + time.monotonic() - began
        if positions is None:
            self._features[key] = rows
        return rows

    def images(self, split: str, samples: np.ndarray, *, crop_share: float) -> Iterator[Tensor]:
        """uint8 central crops [B, H, W, 3] of ``samples`` in the file; use each batch before the next."""
        return self.loader(split, crop_share=crop_share).batches(samples)

    def images_per_second(self) -> float | None:
        """The rate of all extractions for the candidate at hand; None where there was none."""
        return self._images / self._seconds if self._seconds else None

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
        return wide and all(str(_note(path).get("kind", "")).startswith("CLEVR") for path in self.paths)

    def loader(self, split: str, **options: Any) -> ImageLoader:
        """Make an :class:`ImageLoader` with these options, once: compiling one takes seconds."""
        key = (split, *options.items())
        if key not in self._loaders:
            loading = {"image_size": self.image_size, **self._loading, **options}
            self._loaders[key] = ImageLoader(self.datasets[split], **loading)
        return self._loaders[key]


def _note(path: str) -> dict[str, Any]:
    """What to_ffcv.py wrote beside a .beton; empty where it did not."""
    try:
        note = json.loads(Path(f"{path}.json").read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _class_names(paths: tuple[str, str]) -> list[str]:
    """The names of the classes of ``label``, where both files have them; class k is the k-th."""
    train, validation = (_note(path).get("class_names") or [] for path in paths)
    if train and validation and train != validation:
        only = [sorted(set(ours) - set(theirs)) for ours, theirs in ((train, validation), (validation, train))]
        reasons = [f"only {path} has {some(names)}" for path, names in zip(paths, only, strict=True) if names]
        raise UserError(
            f"the classes of {paths[0]} and {paths[1]} are not the same: "
            f"{', '.join(reasons) or 'their order differs'}; convert folders with the same sub-folders"
        )
    return train or validation
