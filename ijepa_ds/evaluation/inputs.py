"""Batches that classifiers are trained on: of rows made once, or of images that are augmented anew in each epoch.

Order, crops and flips are functions of (seed, epoch, sample), whatever the number of processes.

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
from ijepa_ds.errors import UserError
from ijepa_ds.random_streams import permutation


class Inputs:
    """Whole batches in a new order each epoch, this process's share of each; images that do not fill one are left out.

    Args:
        labels: [n].
        batch: images of a step, over all processes; an epoch has ``steps`` of them.
        seed: of the order.
        process: whose share is given.
    """

    def __init__(self, labels: Tensor, *, batch: int, seed: int, process: Process) -> None:
        if batch < process.world_size:
            raise UserError(f"a batch of {batch} cannot be shared by {process.world_size} processes")
        self.labels, self.batch, self.seed, self.process = labels, batch, seed, process
        self.steps, self.num_classes = len(labels) // batch, int(labels.max()) + 1

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs [B, ...] on the device and labels [B] of each step."""
        raise NotImplementedError

    def positions(self, epoch: int) -> np.ndarray:
        """Which of the images this process takes in each step, int64 [steps, B]."""
        order = permutation(self.seed, epoch, len(self.labels))[: self.steps * self.batch]
        return order.reshape(self.steps, self.batch)[:, self.process.rank :: self.process.world_size]


class CachedInputs(Inputs):
    """Rows made once, [n, ...] on the CPU.

    With those of the mirrored images beside them, one of the two is drawn for each epoch.
    """

    def __init__(
        self, rows: Tensor, labels: Tensor, mirrored: Tensor | None = None, *, batch: int, seed: int, process: Process
    ) -> None:
        super().__init__(labels, batch=batch, seed=seed, process=process)
        self.rows, self.mirrored = rows, mirrored

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See :class:`Inputs`."""
        for mine in self.positions(epoch):
            positions = torch.from_numpy(mine)
            rows = self.rows[positions]
            if self.mirrored is not None:
                flips = torch.from_numpy(flips_of(self.seed, epoch, mine))
                rows[flips] = self.mirrored[positions[flips]]
            yield rows.to(self.process.device), self.labels[positions]


class AugmentedInputs(Inputs):
    """Augmented images of ``samples`` [n] in the loader's file, as ``prepare`` makes them.

    ``prepare`` maps uint8 images [b, H, W, 3] on the device to [b, ...], without gradients; it must give a copy.
    """

    def __init__(
        self,
        loader: ImageLoader,
        samples: np.ndarray,
        labels: Tensor,
        prepare: Callable[[Tensor], Tensor],
        *,
        batch: int,
        seed: int,
        process: Process,
    ) -> None:
        super().__init__(labels, batch=batch, seed=seed, process=process)
        self.loader, self.samples, self.prepare = loader, samples, prepare

    @torch.no_grad()
    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See :class:`Inputs`; the loader's batches are joined to those of the steps."""
        positions = self.positions(epoch)
        read = on_device(self.loader.batches(self.samples[positions.reshape(-1)], epoch), self.process.device)
        rows = self.prepare(next(read))
        for mine in positions:
            parts, missing = [rows], len(mine) - len(rows)
            while missing > 0:
                parts.append(self.prepare(next(read)))
                missing -= len(parts[-1])
            rows = torch.cat(parts)
            yield rows[: len(mine)], self.labels[torch.from_numpy(mine)]
            rows = rows[len(mine) :]


class Images(Protocol):
    """Images by their numbers."""

    def batches(self, samples: np.ndarray) -> Iterator[Tensor]:
        """Those of ``samples`` in their order, uint8 [B, H, W, 3]."""


def central_crops(
    loader: Images, samples: np.ndarray, prepare: Callable[[Tensor], Tensor], process: Process
) -> Iterator[Tensor]:
    """This process's share of ``samples`` in order, [b, ...] as ``prepare`` makes them."""
    for images in on_device(loader.batches(samples[process.rank :: process.world_size]), process.device):
        yield prepare(images)
