"""The pretraining loader: images and masks, step by step.

A batch of a step depends on (seed, step, sample) alone, so the same images, crops and masks arrive for any world size,
micro-batch, worker count, and after a resume; see :mod:`ijepa_ds.data.ffcv_pipeline`.

Shapes: B images of a micro-batch, K context tokens, M target blocks, T tokens of a target block, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ijepa_ds.data.beton import Dataset
from ijepa_ds.data.copy_ahead import on_device
from ijepa_ds.data.crops import random_crop
from ijepa_ds.data.ffcv_pipeline import DecodeCrop, Pipeline, SampleMasks, image_spec, keys, refuse_failed
from ijepa_ds.method.masks import MaskSampler
from ijepa_ds.random_streams import permutation


@dataclass
class Batch:
    """One micro-batch. The arrays live in the loader's ring of buffers: use them before the next batch is asked for."""

    images: Tensor  # uint8 [B, H, W, 3]
    context_block: Tensor  # int64 [B, K]
    target_blocks: Tensor  # int64 [M, B, T]
    samples: np.ndarray  # int64 [B]

    def to(self, device: torch.device, *, non_blocking: bool = True) -> Batch:
        """The batch on ``device``, copied asynchronously where the loader's buffers are pinned."""
        images, context_block, target_blocks = (
            tensor.to(device, non_blocking=non_blocking)
            for tensor in (self.images, self.context_block, self.target_blocks)
        )
        return Batch(images, context_block, target_blocks, self.samples)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the tensors' memory until ``stream`` has used them."""
        for tensor in (self.images, self.context_block, self.target_blocks):
            tensor.record_stream(stream)


class PretrainingLoader:
    """Images and masks for pretraining, step by step.

    A step's global batch is cut into micro-batches over accumulation, then ranks, so that its content is the same for
    any world size and micro-batch. Images that do not fill a global batch at the end of an epoch are left out.

    Args:
        dataset: the file.
        sampler: of the masks; order and crops are drawn from its seed.
        image_size: (rows, columns) in pixels of what is given out.
        crop_scale: share of an image's area that a random crop has.
        crop_ratio: width over height of a random crop.
        global_batch: images of a step, over all processes.
        micro_batch: images that are given out at once.
        share: which share of a step this process reads: rank, number of ranks.
        num_workers: loading threads.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: MaskSampler,
        *,
        image_size: tuple[int, int],
        crop_scale: tuple[float, float],
        crop_ratio: tuple[float, float],
        global_batch: int,
        micro_batch: int,
        share: tuple[int, int] = (0, 1),
        num_workers: int = 1,
    ) -> None:
        self.dataset, self.sampler, self.seed = dataset, sampler, sampler.seed
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world_size = share
        self.steps_per_epoch = dataset.num_samples // global_batch
        self.micro_batches_per_step = global_batch // (micro_batch * self.world_size)
        decoder = DecodeCrop(image_size, random_crop, seed=sampler.seed, scale=crop_scale, ratio=crop_ratio)
        pipelines = {"image": image_spec(decoder), "masks": image_spec(SampleMasks(sampler))}
        self.pipeline = Pipeline(dataset, pipelines, batch_size=micro_batch, num_workers=num_workers)

    def from_step(self, step: int, end: int, device: torch.device | str = "cpu") -> Iterator[Iterator[Batch]]:
        """For each step in [step, end) an iterator over this rank's micro-batches on ``device``, to be used up."""
        while step < end:
            epoch, first = divmod(step, self.steps_per_epoch)
            last = min(self.steps_per_epoch, first + end - step)
            order = permutation(self.seed, epoch, self.dataset.num_samples)
            batches = on_device(self._epoch(order, epoch * self.steps_per_epoch, first, last), torch.device(device))
            for _ in range(first, last):
                yield (next(batches) for _ in range(self.micro_batches_per_step))
            step += last - first
            batches.close()

    def step_samples(self, step: int) -> np.ndarray:
        """The samples of a step's global batch in order, int64 [global batch]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = permutation(self.seed, epoch, self.dataset.num_samples)
        return order[position * self.global_batch : (position + 1) * self.global_batch]

    def _epoch(self, order: np.ndarray, epoch_start: int, first: int, last: int) -> Iterator[Batch]:
        shape = (last - first, self.micro_batches_per_step, self.world_size, self.micro_batch)
        slots = order[first * self.global_batch : last * self.global_batch].reshape(shape)
        steps = np.arange(epoch_start + first, epoch_start + last, dtype=np.uint64)
        mine = keys(slots[:, :, self.rank], steps[:, None, None])
        outputs = self.pipeline.traverse(mine.reshape(-1))
        for position, ((images, failed), rows) in enumerate(outputs):
            step, micro = divmod(position, self.micro_batches_per_step)
            samples = slots[step, micro, self.rank]
            refuse_failed(failed, samples, self.dataset.path)
            group = self._truncation_group(slots[step].reshape(-1), micro)
            yield self._batch(images, rows, samples, epoch_start + first + step, group)

    def _truncation_group(self, step_samples: np.ndarray, micro: int) -> np.ndarray:
        """The images over which the reference sampler cuts the context: they may lie on several ranks."""
        size = self.sampler.truncation_group
        slot = (micro * self.world_size + self.rank) * self.micro_batch
        start = slot // size * size
        return step_samples[start : start + size]

    def _batch(self, images: Tensor, rows: Tensor, samples: np.ndarray, step: int, group: np.ndarray) -> Batch:
        context_tokens = self.sampler.context_count(step, group)
        num_targets, room = self.sampler.num_targets, self.sampler.context_room
        tokens = self.sampler.block_sizes(step).target_tokens
        targets = rows[:, 1 + room : 1 + room + num_targets * tokens].reshape(len(rows), num_targets, tokens)
        return Batch(
            images=images,
            context_block=rows[:, 1 : 1 + context_tokens].long(),
            target_blocks=targets.transpose(0, 1).contiguous().long(),
            samples=samples,
        )
