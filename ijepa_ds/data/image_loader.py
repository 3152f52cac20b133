"""Images for the evaluation: centre crops, or augmented ones that are drawn anew in each epoch.

Shapes: B images of a batch, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from ijepa_ds.data.beton import Dataset
from ijepa_ds.data.crops import center_crop, random_crop
from ijepa_ds.data.ffcv_pipeline import DecodeCrop, Pipeline, Request, image_spec, refuse_failed

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of random crops: the usual ImageNet protocol's, torchvision's defaults


class ImageLoader:
    """Images of chosen samples, in the order in which they are asked for.

    Args:
        dataset: the images.
        image_size: (rows, columns) in pixels of what is given out.
        batch_size: images that are given out at once.
        num_workers: decoding threads.
        crop_share: the centre crop's side over the image's shorter side (0.875 = resize 256, crop 224).
        augment: random resized crops instead, every other one mirrored: functions of (seed, epoch, sample).
        seed: of these.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        image_size: tuple[int, int],
        batch_size: int,
        num_workers: int = 1,
        crop_share: float = 1.0,
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        self.dataset = dataset
        if augment:
            decoder = DecodeCrop(image_size, random_crop, seed=seed, scale=AREA, ratio=RATIO, flip=True)
        else:
            ratio = image_size[1] / image_size[0]
            decoder = DecodeCrop(image_size, center_crop, seed=0, scale=(crop_share, 1.0), ratio=(ratio, ratio))
        pipelines = {"image": image_spec(decoder)}
        self.pipeline = Pipeline(dataset, pipelines, batch_size=batch_size, num_workers=num_workers)

    def batches(self, samples: np.ndarray, epoch: int = 0) -> Iterator[Tensor]:
        """Images of ``samples`` in their order, uint8 [B, H, W, 3]; use each batch before the next."""
        starts = range(0, len(samples), self.pipeline.batch_size)
        requests = (Request(samples[start : start + self.pipeline.batch_size], epoch) for start in starts)
        for request, ((images, failed),) in self.pipeline.traverse(requests):
            refuse_failed(failed, request.samples, self.dataset)
            yield images
