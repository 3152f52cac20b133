"""Batches of images themselves, for what trains on more than pooled features: fine-tuning and the attentive probe.

Order, crops and flips are functions of (seed, epoch, sample), as those of the heads' features are.

Shapes: n images in use, B of a step on this process, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ijepa_ds.data.copy_ahead import on_device
from ijepa_ds.data.crops import flips_of
from ijepa_ds.data.image_loader import ImageLoader
from ijepa_ds.distributed import Process
from ijepa_ds.evaluation.candidates import Encoder
from ijepa_ds.evaluation.data import LabelledData
from ijepa_ds.evaluation.probes.heads import steps_per_epoch
from ijepa_ds.random_streams import permutation


class AugmentedInputs:
    """Augmented images, as ``prepare`` makes them, and their labels: this process's share of each step of an epoch.

    Args:
        loader: of the augmented images.
        samples: in the loader's file [n].
        labels: classes of these [n].
        batch: images of a step over all processes; those that do not fill one are left out, others in each epoch.
        prepare: uint8 images on the device [b, H, W, 3] -> [b, ...]; it must give a copy.
    """

    def __init__(
        self,
        loader: ImageLoader,
        samples: np.ndarray,
        labels: Tensor,
        *,
        batch: int,
        seed: int,
        process: Process,
        prepare: Callable[[Tensor], Tensor],
    ) -> None:
        self.loader, self.samples, self.labels, self.prepare = loader, samples, labels, prepare
        self.batch, self.seed, self.process = batch, seed, process
        self.steps = steps_per_epoch(len(samples), batch)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(images [B, ...] on the device, labels [B]) of each step; micro-batches are joined to batches."""
        mine = step_positions(len(self.samples), epoch, batch=self.batch, seed=self.seed)
        mine = mine[:, self.process.rank :: self.process.world_size]
        batches = self.loader.batches(self.samples[mine.reshape(-1)], epoch)
        waiting: list[Tensor] = []
        count, step, size = 0, 0, mine.shape[1]
        for images in on_device(batches, self.process.device):
            waiting.append(self.prepare(images))
            count += len(images)
            while count >= size and step < self.steps:
                rows = torch.cat(waiting)
                yield rows[:size], self.labels[torch.from_numpy(mine[step])]
                waiting, count, step = [rows[size:]], count - size, step + 1


class CachedInputs:
    """Rows made once, [n, ...] on the CPU, and their labels [n]: as :class:`AugmentedInputs` otherwise."""

    def __init__(self, values: Tensor, labels: Tensor, *, batch: int, seed: int, process: Process) -> None:
        self.values, self.labels = values, labels
        self.batch, self.seed, self.process = batch, seed, process
        self.steps = steps_per_epoch(len(values), batch)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows [B, ...], labels [B]) of each step."""
        for positions in step_positions(len(self.values), epoch, batch=self.batch, seed=self.seed):
            mine = torch.from_numpy(positions[self.process.rank :: self.process.world_size])
            yield self.values[mine], self.labels[mine]


def step_positions(num_images: int, epoch: int, *, batch: int, seed: int) -> np.ndarray:
    """Which images each step of an epoch takes, int64 [steps, batch]."""
    steps = steps_per_epoch(num_images, batch)
    return permutation(seed, epoch, num_images)[: steps * batch].reshape(steps, batch)


def validation_batches(
    data: LabelledData, labels: Tensor, crop_share: float, *, prepare: Callable[[Tensor], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(central crops as ``prepare`` makes them [b, ...], labels [b]): this process's share of validation, in order."""
    process, position = data.process, 0
    mine = labels[process.rank :: process.world_size]
    samples = data.samples["validation"][process.rank :: process.world_size]
    read = data.images("validation", samples, crop_share=crop_share)
    for images in on_device(read, process.device):
        yield prepare(images), mine[position : position + len(images)]
        position += len(images)


class TrainingFeatures(Protocol):
    """Where the rows of the batches come from."""

    def epoch(self, epoch: int, batches: np.ndarray) -> Iterator[Tensor]:
        """Features [n, F] on the device for each row of ``batches``, positions [steps, n] among the images used."""


class CachedFeatures:
    """Features made once. With those of the mirrored images beside them, one of the two is drawn for each epoch."""

    def __init__(self, values: Tensor, mirrored: Tensor | None, *, seed: int, device: torch.device):
        self.values, self.mirrored, self.seed, self.device = values, mirrored, seed, device

    def epoch(self, epoch: int, batches: np.ndarray) -> Iterator[Tensor]:
        """See :class:`TrainingFeatures`."""
        for positions in batches:
            rows = self.values[torch.from_numpy(positions)]
            if self.mirrored is not None:
                flips = torch.from_numpy(flips_of(self.seed, epoch, positions))
                rows[flips] = self.mirrored[torch.from_numpy(positions)[flips]]
            yield rows.to(self.device)


class AugmentedFeatures:
    """Features of augmented images, made by the encoder in every epoch; micro-batches are joined to batches."""

    def __init__(self, encoder: Encoder, loader: ImageLoader, samples: np.ndarray, device: torch.device):
        self.encoder, self.loader, self.samples, self.device = encoder, loader, samples, device

    @torch.no_grad()
    def epoch(self, epoch: int, batches: np.ndarray) -> Iterator[Tensor]:
        """See :class:`TrainingFeatures`."""
        waiting: list[Tensor] = []
        count, size = 0, batches.shape[1]
        read = self.loader.batches(self.samples[batches.reshape(-1)], epoch)
        for images in on_device(read, self.device):
            waiting.append(self.encoder.forward(images))
            count += len(images)
            while size and count >= size:
                rows = torch.cat(waiting)
                yield rows[:size]
                waiting, count = [rows[size:]], count - size
