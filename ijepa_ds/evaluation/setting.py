"""What all tasks of one call share: the data, the user's choices, and how labels become classes."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
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
from ijepa_ds.evaluation.inputs import AugmentedInputs
from ijepa_ds.evaluation.labels import CLEVR_EDGES, KEPT_CLASSES, Classes, binned, classes_of
from ijepa_ds.evaluation.probes.recipes import Recipe
from ijepa_ds.evaluation.results import Measurement
from ijepa_ds.method.ijepa import normalize_images
from ijepa_ds.progress import Progress


@dataclass
class Setting:
    """What all tasks of one call share; ``options`` are those of the command line."""

    options: argparse.Namespace
    config: Config
    data: LabelledData
    process: Process
    say: Callable[[str], None] = print
    _progress: Progress | None = None

    @property
    def seed(self) -> int:
        """Of order, crops and heads."""
        return self.config.ijepa.run.seed if self.options.seed is None else self.options.seed

    def share(self) -> float:
        """The central crop's side over an image's shorter side."""
        return self.data.crop_share() if self.options.crop_share is None else self.options.crop_share

    def progress(self, name: str, total: int, what: str = "images") -> Progress:
        """Begin a part of the work; of many short ones a line comes every five seconds, too."""
        self._progress = Progress(total, what=what, name=name, enabled=self.process.is_main, after=self._progress)
        return self._progress

    def features(self, candidate: Candidate, split: str, *, share: float | None = None, **which: Any) -> Tensor:
        """Features of the central crops [n, F]; ``which`` as :meth:`LabelledData.features` has it."""
        positions: np.ndarray | None = which.get("positions")
        number = len(self.data.samples[split] if positions is None else positions)
        progress = self.progress(f"features of {split}, {candidate}", number)
        crop_share = self.share() if share is None else share
        return self.data.features(candidate, split, crop_share=crop_share, progress=progress, **which)

    def adapt(self, recipe: Recipe, num_images: int | None = None) -> Recipe:
        """``recipe`` with the options' numbers instead, its batch no larger than the training images.

        ``num_images`` where only so many of these are labelled.
        """
        options = self.options
        adapted = recipe.adapted(
            epochs=options.epochs, batch=options.batch, lrs=options.lr, weight_decays=options.weight_decay
        )
        fitted = adapted.fitted_to(len(self.data.samples["train"]) if num_images is None else num_images)
        self.check_batch(fitted.batch)
        if fitted.batch < adapted.batch and num_images is None:
            self.say(f"the batch of {adapted.batch} becomes {fitted.batch}: there are no more training images")
        return fitted

    def check_batch(self, batch: int) -> None:
        """Refuse a batch of which some process would have no image (:class:`UserError`)."""
        if batch < self.process.world_size:
            raise UserError(f"a batch of {batch} cannot be shared by {self.process.world_size} processes")

    def augmented(
        self,
        labels: Tensor,
        prepare: Callable[[Tensor], Tensor],
        *,
        batch: int,
        positions: np.ndarray | None = None,
        seed: int | None = None,
    ) -> AugmentedInputs:
        """Augmented training images, or those at ``positions`` among them, which ``labels`` are of."""
        self.check_batch(batch)
        samples = self.data.samples["train"]
        return AugmentedInputs(
            self.data.loader("train", augment=True, seed=self.seed),
            samples if positions is None else samples[positions],
            labels,
            prepare,
            batch=batch,
            seed=self.seed if seed is None else seed,
            process=self.process,
        )

    def normalize(self) -> Callable[[Tensor], Tensor]:
        """Make the function from uint8 images on the device [B, H, W, 3] to the encoder's input [B, 3, H, W], fp32."""
        data = self.config.ijepa.data
        mean, std = (torch.tensor(values, device=self.process.device) for values in (data.mean, data.std))
        return functools.partial(normalize_images, mean=mean, std=std, dtype=torch.float32)

    def measurement(
        self, task: str, field: str, grid: list[dict[str, Any]], began: float, classes: Classes, **more: Any
    ) -> Measurement:
        """A measurement of this setting's images, begun at the time ``began``; ``more`` as :class:`Measurement`."""
        names = classes.names if classes.num_classes <= KEPT_CLASSES else None
        sizes = {f"{split}_images": len(samples) for split, samples in self.data.samples.items()}
        shared = {"images_per_second": self.data.images_per_second(), **sizes, **more}
        shared["extra"] = {"class_names": names, **more.get("extra", {})}
        seconds = round(time.monotonic() - began, 2)
        return Measurement(task=task, label=field, grid=grid, seconds=seconds, **shared)


def class_fields(setting: Setting) -> list[str]:
    """The labels of a classification: those asked for, or ``label``, or all that hold integers."""
    data = setting.data
    if setting.options.label:
        return setting.options.label
    fields = ["label"] if "label" in data.integer_fields else list(data.integer_fields)
    if not fields:
        raise UserError(
            f"{data.paths[0]} and {data.paths[1]} have no label of classes in common (they have: "
            f"{', '.join(data.fields)}); convert class folders with data_prep/to_ffcv.py, or name one with --label"
        )
    return fields


def own_field(setting: Setting, name: str) -> str:
    """The label of a task that has one of its own, unless another is asked for."""
    labels = setting.options.label
    if len(labels) > 1:
        raise UserError(f"--task {name} measures one label: give --label once")
    return labels[0] if labels else name


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
    edges = torch.tensor(CLEVR_EDGES, dtype=torch.float64) if clevr else None
    return binned(field, *setting.data.labels(field), edges=edges)
