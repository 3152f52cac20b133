"""Features of a .beton under an encoder, one row an image, with the labels beside them.

Shapes: n images, D features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ijepa_ds.data.copy_ahead import on_device
from ijepa_ds.data.image_loader import EvaluationLoader
from ijepa_ds.distributed import Process, gather_rows

BATCHES_WAITING = 64  # results left on the device
SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True)
class Features:
    """``values`` fp32 [n, D] and ``labels`` {field: [n]}, on the CPU."""

    values: Tensor
    labels: dict[str, Tensor]


def spread_samples(num_samples: int, limit: int | None) -> np.ndarray:
    """At most ``limit`` samples, evenly spread over the file, ascending: every class folder gives its share."""
    if limit is None or limit >= num_samples:
        return np.arange(num_samples)
    return np.arange(limit) * num_samples // limit


@torch.no_grad()
def extract_features(
    forward: Callable[[Tensor], Tensor],
    loader: EvaluationLoader,
    samples: np.ndarray,
    process: Process,
    *,
    say: Callable[[str], None] | None = None,
) -> Features:
    """``forward`` maps uint8 images [B, H, W, 3] on the device to [B, D]. The ranks share the work; all get all.

    ``say`` takes a line of progress now and then.
    """
    values: list[Tensor] = []
    waiting: list[Tensor] = []
    labels: dict[str, list[Tensor]] = {name: [] for name in loader.label_fields}

    def images_alone() -> Iterator[Tensor]:
        for images, found in loader.batches(samples[process.rank :: process.world_size]):
            for name, label in found.items():
                labels[name].append(label)
            yield images

    count, began = 0, time.monotonic()
    told = began
    for images in on_device(images_alone(), process.device):
        waiting.append(forward(images).float())
        if len(waiting) == BATCHES_WAITING:  # reading a result makes the device wait for the host: seldom
            values, waiting = [*values, torch.cat(waiting).cpu()], []
        count, now = count + len(images), time.monotonic()
        if now - told > SECONDS_BETWEEN_LINES and process.is_main and say is not None:
            told, done = now, min(len(samples), count * process.world_size)
            left = (now - began) / count * max(0, len(samples) / process.world_size - count)
            rate = done / (now - began)
            say(f"  features: {done:,} of {len(samples):,} images, {rate:,.0f} images/s, {left:.0f} s left")
    values += [part.cpu() for part in waiting]
    rows = gather_rows(torch.cat(values), process)
    return Features(rows, {name: gather_rows(torch.cat(parts), process) for name, parts in labels.items()})
