"""Features of a .beton's images under an encoder, one row an image.

Shapes: n images, B of a batch, H x W pixels; a row is [D], or [N, D] of N patches.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ijepa_ds.data.image_loader import ImageLoader
from ijepa_ds.distributed import Process, gather_rows
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.inputs import central_crops
from ijepa_ds.progress import Progress

BATCHES_WAITING = 64  # results left on the device
CHECKED_ROWS = 4096  # at once


class BrokenFeaturesError(UserError):
    """Features that no probe can learn from, because the encoder's weights are no numbers."""


def spread_samples(num_samples: int, limit: int | None) -> np.ndarray:
    """At most ``limit`` samples, evenly spread over the file, ascending: every class folder gives its share."""
    if limit is None or limit >= num_samples:
        return np.arange(num_samples)
    return np.arange(limit) * num_samples // limit


@torch.no_grad()
def extract_features(
    forward: Callable[[Tensor], Tensor],
    loader: ImageLoader,
    samples: np.ndarray,
    process: Process,
    *,
    progress: Progress | None = None,
) -> Tensor:
    """What ``forward`` makes of ``samples``: fp32 [n, ...] on the CPU. The ranks share the work; all get all.

    ``forward`` maps uint8 images [B, H, W, 3] on the device to [B, ...]. Rows that are not finite are refused.
    """
    values: list[Tensor] = []
    waiting: list[Tensor] = []
    count, progress = 0, progress or Progress(len(samples), enabled=False)
    for part in central_crops(loader, samples, forward, process):
        waiting.append(part.float())
        if len(waiting) == BATCHES_WAITING:  # reading a result makes the device wait for the host: seldom
            values, waiting = [*values, torch.cat(waiting).cpu()], []
        count += len(part)
        progress.show(min(len(samples), count * process.world_size))
    progress.end(len(samples))
    rows = gather_rows(torch.cat([*values, *(part.cpu() for part in waiting)]), process)
    if num_bad := sum(int((~part.isfinite().flatten(1).all(dim=1)).sum()) for part in rows.split(CHECKED_ROWS)):
        raise BrokenFeaturesError(
            f"the features of {num_bad} of {len(rows)} images hold NaN or infinity: the checkpoint has diverged or is "
            "damaged"
        )
    return rows
