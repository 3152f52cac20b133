"""What all tasks of one call share: the data, the user's choices, and how labels become classes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ijepa_ds.data.image_loader import ImageLoader
from ijepa_ds.distributed import Process
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.candidates import Encoder
from ijepa_ds.evaluation.data import LabelledData
from ijepa_ds.evaluation.labels import CLEVR_EDGES, Classes, binned, classes_of
from ijepa_ds.evaluation.probes.recipes import Recipe, adapted
from ijepa_ds.evaluation.results import Measurement
from ijepa_ds.method.ijepa import normalize_images

SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class FewLabels:
    """What --task lowshot takes: the files of a list, or so many images a class in each of several draws."""

    split_list: str | None = None
    per_class: tuple[int, ...] = (13,)
    draws: int = 3
    finetune: bool = False
    finetune_lr: float | None = None  # instead of the recipe's


@dataclass
class Setting:
    """What all tasks of one call share. ``labels`` are the fields asked for; empty: each task takes its own."""

    data: LabelledData
    process: Process
    seed: int
    labels: tuple[str, ...] = ()
    cached: bool = False
    preset: str | None = None
    epochs: int | None = None
    batch: int | None = None
    lrs: list[float] | None = None
    weight_decays: list[float] | None = None
    bins: str = "auto"
    crop_share: float | None = None
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of a pixel's full range, as the encoder was trained
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    few: FewLabels = FewLabels()
    say: Callable[[str], None] = print
    told: float = field(default_factory=time.monotonic)  # when progress was last said
    augmented: ImageLoader | None = None  # made when first needed: compiling it takes seconds

    def adapt(self, recipe: Recipe, num_images: int | None = None) -> Recipe:
        """``recipe`` with what was asked for instead, its batch no larger than the training images, or ``num_images``
        where only so many are labelled."""
        asked = adapted(recipe, epochs=self.epochs, batch=self.batch, lrs=self.lrs, weight_decays=self.weight_decays)
        fitted = asked.fitted_to(len(self.data.samples["train"]) if num_images is None else num_images)
        self.check_batch(fitted.batch)
        if fitted.batch < asked.batch and num_images is None:
            self.say(f"the batch of {asked.batch} becomes {fitted.batch}: there are no more training images")
        return fitted

    def check_batch(self, batch: int) -> None:
        """Raises:
        UserError: some process would have no image of a batch.
        """
        if batch < self.process.world_size:
            raise UserError(f"a batch of {batch} cannot be shared by {self.process.world_size} processes")

    def progress(self, name: str) -> Callable[[str], None]:
        """Takes lines of progress of what is called ``name``, and says one every few seconds."""

        def say_now_and_then(line: str) -> None:
            if time.monotonic() - self.told > SECONDS_BETWEEN_LINES:
                self.told = time.monotonic()
                self.say(f"  {name}: {line.strip()}")

        return say_now_and_then

    def share(self) -> float:
        """The central crop's side over an image's shorter side."""
        return self.data.crop_share() if self.crop_share is None else self.crop_share

    def extracted(self, encoder: Encoder, *, crop_share: float) -> tuple[Tensor, Tensor]:
        """Features of the central crops of train and validation."""
        train, validation = (
            self.data.features(encoder, split, crop_share=crop_share) for split in ("train", "validation")
        )
        return train, validation


def class_fields(setting: Setting) -> tuple[str, ...]:
    """The labels of a classification: those asked for, or ``label``, or all that hold integers."""
    data = setting.data
    if setting.labels:
        return setting.labels
    found = ("label",) if "label" in data.integer_fields else data.integer_fields
    if not found:
        raise UserError(
            f"{data.paths[0]} and {data.paths[1]} have no label of classes in common (they have: "
            f"{', '.join(data.fields)}); convert class folders with data_prep/to_ffcv.py, or name one with --label"
        )
    return found


def own_field(setting: Setting, name: str) -> str:
    """The label of a task that has one of its own, unless another is asked for."""
    if len(setting.labels) > 1:
        raise UserError(f"--task {name} measures one label: give --label once")
    field = setting.labels[0] if setting.labels else name
    setting.data.labels(field)  # refuses one that is not there
    return field


def any_classes(setting: Setting, field: str) -> Classes:
    """Classes of an integer label, bins of a continuous one."""
    train, validation = setting.data.labels(field)
    if train.is_floating_point():
        return depth_bins(setting, field)
    names = setting.data.class_names if field == "label" else []
    classes = classes_of(field, train, validation, names)
    empty = [name for name in names if name not in classes.names]
    if empty:  # harmless: no image to measure has them
        more = f" and {len(empty) - 8} more" if len(empty) > 8 else ""
        setting.say(f"{len(empty)} classes have no image in use and are left out: {', '.join(empty[:8])}{more}")
    return classes


def depth_bins(setting: Setting, field: str) -> Classes:
    """CLEVR's bins for CLEVR's images, bins of equal population for others, whose unit is another."""
    train, validation = setting.data.labels(field)
    clevr = setting.bins == "clevr" or (setting.bins == "auto" and field == "depth" and setting.data.is_clevr())
    edges = torch.tensor(CLEVR_EDGES, dtype=torch.float64) if clevr else None
    return binned(field, train, validation, edges=edges)


def measurement(
    setting: Setting, task: str, field: str, grid: list[dict], began: float, *, rate: float | None = None, **more
) -> Measurement:
    """A measurement of this setting's images, begun at the time ``began``; ``more`` as :class:`Measurement` has it."""
    samples = setting.data.samples
    return Measurement(
        task=task,
        label=field,
        grid=grid,
        train_images=len(samples["train"]),
        validation_images=len(samples["validation"]),
        seconds=round(time.monotonic() - began, 2),
        images_per_second=setting.data.images_per_second() if rate is None else rate,
        **more,
    )


def normalized(setting: Setting) -> Callable[[Tensor], Tensor]:
    """uint8 images on the device [B, H, W, 3] -> [B, 3, H, W] in float32, as the encoder expects them."""
    mean, std = (torch.tensor(values, device=setting.process.device) for values in (setting.mean, setting.std))
    return functools.partial(normalize_images, mean=mean, std=std, dtype=torch.float32)


def augmented_loader(setting: Setting) -> ImageLoader:
    """The loader of augmented training images, made once."""
    data = setting.data
    if setting.augmented is None:
        setting.augmented = ImageLoader(
            data.datasets["train"],
            image_size=data.image_size,
            batch_size=data.micro_batch,
            augment=True,
            seed=setting.seed,
            num_workers=data.num_workers,
        )
    return setting.augmented
