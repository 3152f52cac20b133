"""Labelled images for the evaluation: centre crops in file order, and augmented ones in a new order each epoch.

Shapes: B images of a batch, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ijepa_ds.data.beton import Dataset
from ijepa_ds.data.crops import center_crop, random_crop
from ijepa_ds.data.ffcv_pipeline import TIME_SHIFT, DecodeCrop, Pipeline, image_spec, label_specs, refuse_failed
from ijepa_ds.errors import UserError

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of random crops: the usual ImageNet protocol's, torchvision's defaults


class EvaluationLoader:
    """Centre crops and labels in file order, sharded over ranks by stride; no randomness.

    ``crop_share`` is the centre crop's side over the image's shorter side (0.875 = resize 256, crop 224).
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        image_size: tuple[int, int],
        batch_size: int,
        num_workers: int = 1,
        crop_share: float = 1.0,
        label_fields: tuple[str, ...] | None = None,
    ):
        self.dataset = dataset
        self.label_fields = dataset.label_fields if label_fields is None else label_fields
        missing = [name for name in self.label_fields if name not in dataset.label_fields]
        if missing:
            has = ", ".join(dataset.label_fields) or "none"
            raise UserError(f"{dataset.path} has no label field '{missing[0]}' (it has: {has}); choose one of these")
        ratio = image_size[1] / image_size[0]
        decoder = DecodeCrop(image_size, center_crop, seed=0, scale=(crop_share, 1.0), ratio=(ratio, ratio))
        labels = label_specs(dataset, self.label_fields)
        self._order = list(labels)
        pipelines = {"image": image_spec(decoder), **labels}
        self.pipeline = Pipeline(dataset, pipelines, batch_size=batch_size, num_workers=num_workers)

    def batches(self, samples: np.ndarray) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """uint8 images [B, H, W, 3] and labels {field: [B]} of the given samples; use each before the next."""
        position = 0
        for outputs in self.pipeline.traverse(np.asarray(samples, np.uint64)):
            images, failed = outputs[0]
            refuse_failed(failed, samples[position : position + len(images)], self.dataset.path)
            position += len(images)
            yield images, {name: label[:, 0].clone() for name, label in zip(self._order, outputs[1:], strict=True)}


class AugmentedLoader:
    """Training images of a linear probe: random resized crops (or the central one), every other image mirrored.

    What becomes of an image is a function of (seed, epoch, sample).
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        image_size: tuple[int, int],
        batch_size: int,
        seed: int,
        num_workers: int = 1,
        crop: bool = True,
        crop_share: float = 1.0,
        flip: bool = True,
    ):
        self.dataset = dataset
        ratio = image_size[1] / image_size[0]
        if crop:
            decoder = DecodeCrop(image_size, random_crop, seed=seed, scale=AREA, ratio=RATIO, flip=flip)
        else:
            share = (crop_share, 1.0)
            decoder = DecodeCrop(image_size, center_crop, seed=seed, scale=share, ratio=(ratio, ratio), flip=flip)
        pipelines = {"image": image_spec(decoder)}
        self.pipeline = Pipeline(dataset, pipelines, batch_size=batch_size, num_workers=num_workers)

    def batches(self, samples: np.ndarray, epoch: int) -> Iterator[torch.Tensor]:
        """uint8 images [B, H, W, 3] of the given samples in their order; use each batch before the next."""
        keys = np.asarray(samples, np.uint64) | (np.uint64(epoch) << TIME_SHIFT)
        position = 0
        for ((images, failed),) in self.pipeline.traverse(keys):
            refuse_failed(failed, samples[position : position + len(images)], self.dataset.path)
            position += len(images)
            yield images
