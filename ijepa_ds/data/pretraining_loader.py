"""The pretraining loader: images and masks, step by step.

A batch of a step depends on (seed, step, sample) alone, so the same images, crops and masks arrive for any world size,
micro-batch, worker count, and after a resume; see :mod:`ijepa_ds.data.ffcv_pipeline`.

Shapes: B images of a micro-batch, K context tokens, M target blocks, T tokens of a target block, H x W pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ijepa_ds.data.beton import Dataset
from ijepa_ds.data.copy_ahead import on_device
from ijepa_ds.data.crops import Crops, random_crop
from ijepa_ds.data.ffcv_pipeline import (
    PLAIN,
    DecodeCrop,
    Draws,
    Pipeline,
    Request,
    SampleMasks,
    image_spec,
    refuse_failed,
)
from ijepa_ds.method.masks import MaskSampler
from ijepa_ds.random_streams import permutation


@dataclass
class Batch:
    """One micro-batch. On a CPU its images lie in the loader's ring of buffers: use them before asking for the next."""

    images: Tensor  # uint8 [B, H, W, 3]
    context_block: Tensor  # int64 [C * B, K], C contexts an image: all of the first, then all of the second
    target_blocks: Tensor  # int64 [M, C * B, T]
    samples: np.ndarray  # int64 [B]
    keys: Tensor | None = None  # int64 [C * B]: of what is drawn on the device, if anything is

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the tensors' memory until ``stream`` has used them."""
        for tensor in (self.images, self.context_block, self.target_blocks, self.keys):
            if tensor is not None:
                tensor.record_stream(stream)


@dataclass(frozen=True)
class _MicroBatch(Request):
    """What the loading thread is asked for, with the sizes that its step's masks have."""

    context_tokens: int
    target_tokens: int


@dataclass(frozen=True)
class _Loaded:
    """A micro-batch in the loader's buffers. They are sent whole: what is cut out of them lies in pageable memory."""

    request: _MicroBatch
    images: Tensor  # uint8 [B, H, W, 3]
    rows: Tensor  # int32, of SampleMasks
    sampler: MaskSampler
    draws: Draws

    def to(self, device: torch.device, *, non_blocking: bool = True) -> Batch:
        """The batch on ``device``, copied asynchronously where the buffers are pinned; the masks are cut out there."""
        images, rows = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.images, self.rows))
        begin, shape = 1 + self.sampler.context_room, (self.sampler.num_targets, self.request.target_tokens)
        rows = rows.unflatten(1, (self.draws.contexts, -1)).transpose(0, 1).flatten(0, 1)  # a context each
        targets = rows[:, begin : begin + shape[0] * shape[1]].unflatten(1, shape).transpose(0, 1)
        return Batch(
            images=images,
            context_block=rows[:, 1 : 1 + self.request.context_tokens].long(),
            target_blocks=targets.to(torch.int64, memory_format=torch.contiguous_format),
            samples=self.request.samples,
            keys=rows[:, -2:].contiguous().view(torch.int64)[:, 0] if self.draws.keys else None,
        )


class PretrainingLoader:
    """Images and masks for pretraining, step by step.

    A step's global batch is cut into micro-batches over accumulation, then ranks, so that its content is the same for
    any world size and micro-batch. Images that do not fill a global batch at the end of an epoch are left out.

    Args:
        dataset: the images.
        sampler: of the masks; order and crops are drawn from its seed.
        image_size: (rows, columns) in pixels of what is given out.
        crops: what is cut out of an image.
        global_batch: images of a step, over all processes.
        micro_batch: images that are given out at once.
        share: which share of a step this process reads: rank, number of ranks.
        num_workers: loading threads.
        draws: what is drawn for an image beside a crop and one context with its targets.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: MaskSampler,
        *,
        image_size: tuple[int, int],
        crops: Crops,
        global_batch: int,
        micro_batch: int,
        share: tuple[int, int] = (0, 1),
        num_workers: int = 1,
        draws: Draws = PLAIN,
    ) -> None:
        self.dataset, self.sampler, self.seed = dataset, sampler, sampler.seed
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world_size = share
        self.steps_per_epoch = dataset.num_samples // global_batch
        self.micro_batches_per_step = global_batch // (micro_batch * self.world_size)
        self.crops, self.draws = crops, draws
        decoder = DecodeCrop(
            image_size, random_crop, seed=sampler.seed, scale=crops.scale, ratio=crops.ratio, flip=crops.flip
        )
        pipelines = {"image": image_spec(decoder), "masks": image_spec(SampleMasks(sampler, draws))}
        self.pipeline = Pipeline(dataset, pipelines, batch_size=micro_batch, num_workers=num_workers)

    def from_step(self, step: int, end: int, device: torch.device | str = "cpu") -> Iterator[Iterator[Batch]]:
        """For each step in [step, end) an iterator over this rank's micro-batches on ``device``, to be used up."""
        batches = on_device(self._batches(step, end), torch.device(device))
        try:
            for _ in range(step, end):
                yield (next(batches) for _ in range(self.micro_batches_per_step))
        finally:
            batches.close()

    def step_samples(self, step: int) -> np.ndarray:
        """The samples of a step's global batch in order, int64 [global batch]."""
        return next(self._global_batches(step, step + 1))

    def step_slots(self, step: int) -> np.ndarray:
        """The same as they are dealt out: int64 [micro-batches, ranks, micro_batch]."""
        return self._dealt(self.step_samples(step))

    def _dealt(self, samples: np.ndarray) -> np.ndarray:
        return samples.reshape(self.micro_batches_per_step, self.world_size, self.micro_batch)

    def _batches(self, step: int, end: int) -> Iterator[_Loaded]:
        for request, ((images, failed), rows) in self.pipeline.traverse(self._requests(step, end)):
            refuse_failed(failed, request.samples, self.dataset)
            yield _Loaded(request, images, rows, self.sampler, self.draws)

    def _requests(self, step: int, end: int) -> Iterator[_MicroBatch]:
        for time, samples in zip(range(step, end), self._global_batches(step, end), strict=True):
            target_tokens = self.sampler.block_sizes(time).target_tokens
            for micro, mine in enumerate(self._dealt(samples)[:, self.rank]):
                group = self._truncation_group(samples, micro)
                yield _MicroBatch(mine, time, self.sampler.context_count(time, group), target_tokens)

    def _global_batches(self, step: int, end: int) -> Iterator[np.ndarray]:
        """The samples of each step in [step, end)."""
        first, last = step // self.steps_per_epoch, -(-end // self.steps_per_epoch)
        for epoch, order in enumerate(self._orders(first, last), first):
            start = epoch * self.steps_per_epoch
            for position in range(max(step - start, 0), min(end - start, self.steps_per_epoch)):
                yield order[position * self.global_batch : (position + 1) * self.global_batch]

    def _orders(self, first: int, last: int) -> Iterator[np.ndarray]:
        """The order of each epoch in [first, last), made while the one before it is read, so that no step waits."""
        make = functools.partial(permutation, self.seed, num_samples=self.dataset.num_samples)
        with ThreadPoolExecutor(1) as maker:
            coming = maker.submit(make, first)
            for epoch in range(first + 1, last + 1):
                order = coming.result()
                if epoch < last:
                    coming = maker.submit(make, epoch)
                yield order

    def _truncation_group(self, step_samples: np.ndarray, micro: int) -> np.ndarray:
        """The images over which the reference sampler cuts the context: they may lie on several ranks."""
        size = self.sampler.truncation_group
        slot = (micro * self.world_size + self.rank) * self.micro_batch
        start = slot // size * size
        return step_samples[start : start + size]
