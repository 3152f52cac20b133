"""What all tasks of one call share: the data, the user's choices, and how labels become classes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ijepa_ds.config import Config
from ijepa_ds.distributed import Process
from ijepa_ds.errors import UserError, some
from ijepa_ds.evaluation.candidates import Candidate
from ijepa_ds.evaluation.data import LabelledData
from ijepa_ds.evaluation.dense_data import Example
from ijepa_ds.evaluation.features import extract_features
from ijepa_ds.evaluation.inputs import AugmentedInputs, CachedInputs
from ijepa_ds.evaluation.labels import CLEVR_EDGES, KEPT_CLASSES, Classes, binned, classes_of
from ijepa_ds.evaluation.probes.recipes import Recipe
from ijepa_ds.evaluation.results import Head, Measurement, best_of, mean_and_deviation
from ijepa_ds.progress import Progress


@dataclass
class Setting:
    """What all tasks of one call share; ``options`` are those of the command line."""

    options: argparse.Namespace
    config: Config
    labelled: LabelledData | None  # None where --task dense alone was asked for, which has images of its own
    process: Process
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self.examples: dict[str, list[Example]] = {}  # by picture, of --task dense
        self._progress: Progress | None = None
        self._owner: Candidate | None = None  # whose features are kept
        self._features: dict[tuple[str, float, bool], Tensor] = {}
        self._extracted = 0, 0.0  # images, seconds, of this candidate

    @property
    def data(self) -> LabelledData:
        """The labelled images."""
        assert self.labelled is not None, "a task asks for labelled images that were not opened"
        return self.labelled

    @property
    def seed(self) -> int:
        """Of order, crops and heads."""
        return self.config.ijepa.run.seed if self.options.seed is None else self.options.seed

    def fields(self) -> list[str]:
        """The labels of a task that takes any: those asked for, or all."""
        return self.options.label or list(self.data.fields)

    def share(self) -> float:
        """The central crop's side over an image's shorter side."""
        return self.data.crop_share() if self.options.crop_share is None else self.options.crop_share

    def progress(self, name: str, total: int, what: str = "images") -> Progress:
        """Begin a part of the work; of many short ones a line comes every five seconds, too."""
        self._progress = Progress(total, what=what, name=name, enabled=self.process.is_main, after=self._progress)
        return self._progress

    def features(
        self,
        candidate: Candidate,
        split: str,
        *,
        share: float | None = None,
        mirrored: bool = False,
        positions: np.ndarray | None = None,
    ) -> Tensor:
        """Features fp32 [n, F] of the central crops, on the CPU, or of those at ``positions`` among the images in use.

        Those of all images are kept until another candidate is asked about.
        """
        if self._owner is not candidate:
            self._owner, self._features, self._extracted = candidate, {}, (0, 0.0)
        share = self.share() if share is None else share
        kept = self._features.get((split, share, mirrored))
        if kept is not None:
            return kept if positions is None else kept[torch.from_numpy(positions)]
        samples = self.data.samples[split] if positions is None else self.data.samples[split][positions]
        loader, began = self.data.loader(split, crop_share=share), time.monotonic()

        def forward(images: Tensor) -> Tensor:
            return candidate.forward(images.flip(2) if mirrored else images)

        progress = self.progress(f"features of {split}, {candidate}", len(samples))
        rows = extract_features(forward, loader, samples, self.process, progress=progress)
        images, seconds = self._extracted
        self._extracted = images + len(samples), seconds + time.monotonic() - began
        if positions is None:
            self._features[split, share, mirrored] = rows
        return rows

    def adapt(self, recipe: Recipe, num_images: int) -> Recipe:
        """``recipe`` with the options' numbers instead, and no larger a batch than there are images."""
        options, batch = self.options, min(self.options.batch or recipe.batch, num_images)
        numbers = {"epochs": options.epochs, "lrs": options.lr, "weight_decays": options.weight_decay}
        return recipe.adapted(batch=batch, **numbers)

    def cached(self, rows: Tensor, labels: Tensor, batch: int, mirrored: Tensor | None = None) -> CachedInputs:
        """Batches of rows that were made once."""
        return CachedInputs(rows, labels, mirrored, batch=batch, seed=self.seed, process=self.process)

    def augmented(
        self,
        labels: Tensor,
        batch: int,
        prepare: Callable[[Tensor], Tensor],
        *,
        positions: np.ndarray | slice = slice(None),
        draw: int = 0,
    ) -> AugmentedInputs:
        """Batches of augmented training images, or of those at ``positions`` among them, which ``labels`` are of."""
        loader, seed = self.data.loader("train", augment=True, seed=self.seed), self.seed + draw
        samples = self.data.samples["train"][positions]
        return AugmentedInputs(loader, samples, labels, prepare, batch=batch, seed=seed, process=self.process)

    def measurement(
        self,
        task: str,
        field: str,
        classes: Classes,
        heads: Sequence[Head],
        predictions: Sequence[Tensor],
        began: float,
        *,
        extra: dict[str, Any] | None = None,
        rate: float | None = None,
    ) -> Measurement:
        """Score the classes that each of ``heads`` gives the validation images, [m] or of several draws [draws, m].

        ``began`` is when the task did, ``rate`` images per second where not those of the candidate's extractions.
        """
        grid = [head | _scores(classes, rows) for head, rows in zip(heads, predictions, strict=True)]
        best = predictions[grid.index(best_of(grid))]
        names = classes.names if classes.num_classes <= KEPT_CLASSES else None
        train, validation = map(len, self.data.samples.values())
        images, seconds = self._extracted
        return Measurement(
            task=task,
            label=field,
            grid=grid,
            train_images=train,
            validation_images=validation,
            seconds=round(time.monotonic() - began, 2),
            images_per_second=images / seconds if rate is None and seconds else rate,
            extra={"class_names": names, **(extra or {})},
            confusion=classes.confusion(best if best.ndim == 1 else best[0]),
        )


def _scores(classes: Classes, predictions: Tensor) -> Head:
    if predictions.ndim == 1:
        return {"value": classes.accuracy(predictions)}
    values = [classes.accuracy(draw) for draw in predictions]
    mean, deviation = mean_and_deviation(values)
    return {"value": mean, "deviation": deviation, "values": values}


def class_fields(setting: Setting) -> list[str]:
    """The labels of a classification: those asked for, or ``label``, or all that hold integers."""
    data = setting.data
    fields = setting.options.label or (["label"] if "label" in data.integer_fields else data.integer_fields)
    if not fields:
        raise UserError(
            f"{data.paths[0]} and {data.paths[1]} have no label of classes in common (they have: "
            f"{', '.join(data.fields)}); convert class folders with data_prep/to_ffcv.py, or name one with --label"
        )
    return fields


def own_field(setting: Setting, name: str) -> list[str]:
    """The label of a task that has one of its own, unless another is asked for."""
    if len(setting.options.label) > 1:
        raise UserError(f"--task {name} measures one label: give --label once")
    return setting.options.label or [name]


def integer_classes(setting: Setting, field: str) -> Classes:
    """A class for each number."""
    return classes_of(field, *setting.data.labels(field))


def any_classes(setting: Setting, field: str) -> Classes:
    """Classes of an integer label, bins of a continuous one."""
    train, validation = setting.data.labels(field)
    if train.is_floating_point():
        return depth_bins(setting, field)
    names = setting.data.class_names if field == "label" else []
    classes = classes_of(field, train, validation, names)
    if empty := [name for name in names if name not in classes.names]:  # harmless: no image to measure has them
        setting.say(f"{len(empty)} classes have no image in use and are left out: {some(empty)}")
    return classes


def depth_bins(setting: Setting, field: str) -> Classes:
    """CLEVR's bins for CLEVR's images, bins of equal population for others, whose unit is another."""
    bins = setting.options.bins
    clevr = bins == "clevr" or (bins == "auto" and field == "depth" and setting.data.is_clevr())
    return binned(field, *setting.data.labels(field), edges=CLEVR_EDGES if clevr else None)
